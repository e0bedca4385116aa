"""`train` with the hyperparameters as keywords, for tests that vary one of them."""

from fedmomentum.config.training import LocalTraining
from fedmomentum.training import trainer


def train(
    model,
    examples,
    *,
    pad_token_id,
    seed,
    on_step=None,
    penalty=None,
    moments=None,
    **hyperparameters,
):
    return trainer.train(
        model,
        examples,
        LocalTraining(**hyperparameters),
        pad_token_id=pad_token_id,
        seed=seed,
        on_step=on_step,
        penalty=penalty,
        moments=moments,
    )
