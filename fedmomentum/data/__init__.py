"""What clients train and are tested on.

Users' files and built-in tasks, how they are divided among clients, and tokenization.
"""

from fedmomentum.data.builtin_tasks import DEFAULT_TASKS as DEFAULT_TASKS
from fedmomentum.data.builtin_tasks import score_answer as score_answer
from fedmomentum.data.builtin_tasks import task_examples as task_examples
from fedmomentum.data.client_data import load_clients as load_clients
from fedmomentum.data.client_data import partition_table as partition_table
from fedmomentum.data.examples import ClientData as ClientData
from fedmomentum.data.examples import Example as Example
from fedmomentum.data.examples import Prompt as Prompt
from fedmomentum.data.readers import read_rows as read_rows
from fedmomentum.data.readers import to_examples as to_examples
from fedmomentum.data.tokenization import tokenize as tokenize
from fedmomentum.data.tokenized import TokenizedExamples as TokenizedExamples
