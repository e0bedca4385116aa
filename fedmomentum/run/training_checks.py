"""Check `[training]` against the method, the adapter and the data."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fedmomentum.errors import ConfigError, DataError
from fedmomentum.training.arguments import check_optimizer

if TYPE_CHECKING:
    from fedmomentum.aggregation import Method
    from fedmomentum.config.schema import Config
    from fedmomentum.config.training import TrainingConfig
    from fedmomentum.data.tokenized import TokenizedExamples
    from fedmomentum.objectives.objective import Objective


def choose_optimizer_state(config: Config, method: Method, *, is_reference: bool = False) -> Config:
    """Return the configuration with an optimizer state that the method supports.

    `auto` becomes `shared` if the method is made for it, the built-in trainer is used, and nothing
    in the configuration rules it out; otherwise `fresh`. A comparison's reference is a single
    client, whose optimizer continues: `local`.

    Raises:
        ConfigError: If a state other than `auto` is given and cannot be carried.
    """
    training = config.training
    if training.optimizer_state != "auto":
        _check_optimizer_state(config, method)
        return config
    fresh = replace(config, training=replace(training, optimizer_state="fresh"))
    # A user's own training function would have to return moments, which most do not.
    if training.function is not None or not (is_reference or method.shares_moments):
        return fresh
    state = "local" if is_reference else "shared"
    chosen = replace(config, training=replace(training, optimizer_state=state))
    try:
        _check_optimizer_state(chosen, method)
        if chosen.privacy.secure_aggregation and chosen.training.shares_moments:
            # Imported only by runs with secure sums.
            from fedmomentum.run.privacy_checks import check_shared_moments

            check_shared_moments(chosen)
    except ConfigError:
        return fresh
    return chosen


def _check_optimizer_state(config: Config, method: Method) -> None:
    """Refuse to carry the optimizer's moments if they have no meaning in the next round.

    Raises:
        ConfigError: If the method starts every round from a fresh adapter, if moments are shared
            between clients that train different factors, or if the optimizer's moments cannot be
            read.
    """
    state = config.training.optimizer_state
    if state == "fresh":
        return
    key = f"training.optimizer-state = {state}"
    if method.fresh:
        raise ConfigError(
            f"{method.title} starts every round from a fresh adapter, for which earlier moments "
            f"say nothing; {key} needs a method that continues its adapter. Set it to fresh"
        )
    if state != "local":
        if method.personal_factors:
            raise ConfigError(
                f"{method.title} leaves factors with each client, so that clients do not train the "
                f"same; {key} cannot be used. Set it to local, or fresh"
            )
        if config.lora.clients or method.prunes:
            raise ConfigError(
                f"{key} needs every client to train the same adapter; lora.clients and methods "
                "that prune give clients adapters of their own. Set it to local, or fresh"
            )
    if config.training.function is None:
        check_optimizer(config.training.arguments)


def check_dropout(config: Config) -> None:
    """Refuse dropout if the model is compared with a reference that has none.

    Raises:
        ConfigError: If dropout is used.
    """
    if config.training.objective == "dpo" and config.lora.dropout:
        raise ConfigError(
            f"lora.dropout must be 0 with training.objective = dpo; got {config.lora.dropout:g}. "
            "The rewards compare the model with the base model, and noise in one of them would "
            "count as a preference"
        )


def check_sampling(training: TrainingConfig, *, is_pooled: bool = False) -> None:
    """Refuse rows in their given order if a round does not reach the last one.

    Each round starts from the first row again, so the others would never be trained on.

    Args:
        training: The training settings.
        is_pooled: Whether one client trains on the data of all, in one client's number of steps.

    Raises:
        ConfigError: If the rows are trained on in order, and a round is less than a pass.
    """
    strategy = training.arguments.get("train_sampling_strategy")
    # A user's own function reads the arguments as it likes.
    if strategy != "sequential" or training.function is not None:
        return
    if is_pooled:
        raise ConfigError(
            "training argument train_sampling_strategy = sequential cannot be used with the "
            "reference centralized: it takes only as many steps as one client, so it would train "
            "on the first client's rows in every round. Set it to random, or leave out centralized"
        )
    if training.local_epochs is None or training.local_epochs < 1:
        given = (
            f"local-steps = {training.local_steps}"
            if training.local_epochs is None
            else f"local-epochs = {training.local_epochs:g}"
        )
        raise ConfigError(
            f"training argument train_sampling_strategy = sequential with {given}: each round "
            "starts from a client's first row again, so the same first rows would be trained on in "
            "every round, and the others never. Set training.local-epochs to 1 or more, or "
            "train_sampling_strategy to random"
        )


def check_pairs(examples: TokenizedExamples, objective: Objective, owner: str) -> None:
    """Refuse examples that do not suit the objective.

    Raises:
        DataError: If pairs are needed but missing, or the reverse.
    """
    if not len(examples) or examples.are_pairs == objective.compares_pairs:
        return
    if examples.are_pairs:
        raise DataError(
            f"{owner}: the rows hold a chosen and a rejected answer; set training.objective = "
            '"dpo", or give rows with one answer'
        )
    raise DataError(
        f'{owner}: training.objective = "dpo" needs rows of prompt, chosen and rejected; these '
        "hold one answer"
    )
