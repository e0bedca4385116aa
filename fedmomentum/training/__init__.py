"""Local training on one machine, on top of transformers' Trainer.

It knows nothing about federation.
"""

from fedmomentum.training.function import TrainReport as TrainReport
