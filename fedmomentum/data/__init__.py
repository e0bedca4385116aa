"""What clients train and are tested on: users' files, built-in tasks, and how they are divided among clients."""

from fedmomentum.data.clients import load_clients as load_clients
from fedmomentum.data.clients import partition_table as partition_table
from fedmomentum.data.examples import ClientData as ClientData
from fedmomentum.data.examples import Example as Example
from fedmomentum.data.examples import Prompt as Prompt
from fedmomentum.data.partition import PARTITIONS as PARTITIONS
from fedmomentum.data.partition import partition as partition
from fedmomentum.data.read import read_rows as read_rows
from fedmomentum.data.read import to_examples as to_examples
from fedmomentum.data.tasks import DEFAULT_TASKS as DEFAULT_TASKS
from fedmomentum.data.tasks import score as score
from fedmomentum.data.tasks import task_examples as task_examples
from fedmomentum.data.tokens import TokenisedExamples as TokenisedExamples
from fedmomentum.data.tokens import tokenise as tokenise
