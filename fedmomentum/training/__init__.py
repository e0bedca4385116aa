"""Local training on one machine, on top of transformers' Trainer.

It knows no federation.
"""

from fedmomentum.training.function import TrainReport as TrainReport
