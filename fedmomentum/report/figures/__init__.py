"""The figures of the reports, as SVG."""
