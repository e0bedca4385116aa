"""From a run folder to a page that can be read anywhere. Reads files only."""

from fedmomentum.report.cells import COMPARISON as COMPARISON
from fedmomentum.report.comparison_page import write_comparison_page as write_comparison_page
from fedmomentum.report.page import write_report as write_report
from fedmomentum.report.run import Run as Run
from fedmomentum.report.run import read_run as read_run
from fedmomentum.report.summary import Measure as Measure
from fedmomentum.report.summary import SummaryRow as SummaryRow
from fedmomentum.report.summary import summarise as summarise
from fedmomentum.report.summary import wilson_interval as wilson_interval
