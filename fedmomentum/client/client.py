"""`Client`: one participant in a federation, from the bytes of a task to the bytes of its reply.

Every transport calls `Client.handle`. A process loads the base model once, however many clients it
runs: they share a `LocalModel`, which is set to the global model of each task.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec
import torch

from fedmomentum.client.client_sum_work import ClientSumWork
from fedmomentum.client.work import WorkResult
from fedmomentum.data.split import split_fingerprint
from fedmomentum.errors import ConfigError, ModelError
from fedmomentum.global_model.local_moments import LocalMoments
from fedmomentum.global_model.personal import PersonalFactors
from fedmomentum.global_model.shared_moments import SharedMoments
from fedmomentum.protocol.adapter_terms import ClientLora
from fedmomentum.protocol.codec import decode_task, encode_reply
from fedmomentum.protocol.messages import (
    SECONDS,
    DescribeRequest,
    EvaluateRequest,
    MissingObjects,
    Reply,
    Task,
    TrainRequest,
)
from fedmomentum.protocol.secure_messages import (
    WITHHELD_COUNT,
    WITHHELD_SPLIT,
    SumRequest,
)
from fedmomentum.utils.chat_date import check_chat_date

if TYPE_CHECKING:
    from fedmomentum.aggregation.moments import Moments
    from fedmomentum.config.schema import LoraConfig
    from fedmomentum.global_model.model import GlobalModel


# A request that involves a global model.
ModelTask = TrainRequest | EvaluateRequest


@dataclass(kw_only=True)
class Client(ClientSumWork):
    """One participant: its data, its model, and its state between tasks."""

    _splits: dict[str, str] = field(init=False, repr=False, default_factory=dict)

    def handle(self, payload: bytes, *, is_smoke_test: bool = False) -> bytes:
        """Perform one task: load the global model that it names, train or evaluate it, and reply.

        Args:
            payload: The encoded task.
            is_smoke_test: Whether the reply stays on this machine, so that private training does
                not spend any budget.

        Raises:
            PrivacyError: If private training would spend more than this party allows.
            PayloadError: If the bytes are not a task.
            ModelError: If the task is for another client or base model, or the resulting global
                model is not the version that the task names.
            FedMomentumError: If training or evaluation fails.
        """
        task = decode_task(payload)
        if task.client_id != self.client_id:
            raise ModelError(f"a task for {task.client_id} came to {self.client_id}")
        request = task.request
        if isinstance(request, SumRequest):
            named = {request.means} if request.means else set()
            return self._reply(task, self.answer_sum(task, request), cached_objects=named)
        self.check_privacy(is_secure=request.is_secure)
        if isinstance(request, DescribeRequest):
            return self._reply(task, self.describe(request))
        if isinstance(request, TrainRequest):
            self._check_private_terms(request)
            repeated = None if is_smoke_test else self._repeated_reply(task, request)
            if repeated is not None:
                return repeated
        started = time.perf_counter()

        received = self.store.receive(task, self.model.fresh)
        needed = set(request.needed)
        if isinstance(received, MissingObjects):
            cached = needed - set(received.missing)
            return self._reply(task, WorkResult(received, 1, {}), cached_objects=cached)

        client_lora = self._agree(request, received)
        # The reference is the base model alone, so measure it before loading a global model.
        self.measure_references(request)
        self._load(task, request, received, client_lora)
        self.store.evict(needed)
        loading_seconds = time.perf_counter() - started

        terms = request.private if isinstance(request, TrainRequest) else None
        if is_smoke_test or terms is None or self.private is None:
            return self._work(task, received, client_lora, loading_seconds)
        # Record the spent budget on disk before the first step, and the reply before it is sent.
        assert isinstance(request, TrainRequest)
        mechanism = self.private.settings(terms, request.hyperparameters).mechanism
        with self.private.training(task, request, mechanism) as training:
            reply = self._work(task, received, client_lora, loading_seconds)
            training.finish(reply)
        return reply

    def _work(
        self, task: Task, received: GlobalModel, client_lora: LoraConfig, loading_seconds: float
    ) -> bytes:
        """Train or evaluate the loaded model, and return the reply."""
        request = task.request
        started = time.perf_counter()
        assert isinstance(request, TrainRequest | EvaluateRequest)
        if isinstance(request, TrainRequest):
            moments = self._start_moments(task, request)
            if request.is_secure:
                result = self.train_for_sums(task, request, received, moments)
            else:
                result = self.run_training(request, task.server_round, moments)
            self._save_personal(task, client_lora)
            self._save_moments(task, request, {**(moments or {}), **result.moments})
        elif request.is_secure:
            result = self.evaluate_for_sums(task, request, received)
        else:
            result = self.run_evaluation(request, received)
        if not request.is_secure:
            # Timings are withheld from secure replies: they reveal how much data a client has.
            seconds = [loading_seconds, time.perf_counter() - started]
            result.tensors[SECONDS] = torch.tensor(seconds, dtype=torch.float64)
        needed = set(request.needed)
        return self._reply(task, result, version=received.version, cached_objects=needed)

    # ── differential privacy ──

    def _check_private_terms(self, request: TrainRequest) -> None:
        """Check that the run protects the data as configured here.

        Raises:
            ConfigError: If it does not.
        """
        if self.private is None and request.private is not None:
            raise ConfigError(
                "the run has differential privacy; [privacy] here does not. Set [privacy.dp] with "
                "a budget, so that what it spends is counted here"
            )
        if self.private is not None and request.private is None:
            raise ConfigError(
                f"client {self.client_id} takes part in runs with differential privacy only "
                "([privacy.dp]), and this one has none"
            )
        if self.private is not None and request.private is not None:
            self.private.check_terms(request.private)

    def _repeated_reply(self, task: Task, request: TrainRequest) -> bytes | None:
        """Return the stored reply if this private training was already done, else None.

        With secure aggregation, the trained update must still be in memory.
        """
        if self.private is None:
            return None
        if request.is_secure and not self.has_round(task):
            return None
        return self.private.stored_reply(task, request)

    def split(self, run_id: str) -> str:
        """Return a hash of the split into training and held-out examples.

        Args:
            run_id: The run; hashes of different runs do not reveal whether their splits are equal.
        """
        if run_id not in self._splits:
            self._splits[run_id] = split_fingerprint(self.train, self.test, run_id)
        return self._splits[run_id]

    def _reply(
        self,
        task: Task,
        result: WorkResult,
        *,
        version: str = "",
        cached_objects: set[str] | frozenset[str] = frozenset(),
    ) -> bytes:
        """Encode the reply to a task, leaving out what this client withholds."""
        is_secure = self.party is not None
        is_withheld = is_secure or self.private is not None
        reply = Reply(
            run_id=task.run_id,
            client_id=self.client_id,
            server_round=task.server_round,
            version=version,
            holds=sorted(cached_objects),
            num_examples=WITHHELD_COUNT if is_secure else result.num_examples,
            split=WITHHELD_SPLIT if is_withheld else self.split(task.run_id),
            answer=result.answer,
            tensors=result.tensors,
        )
        return encode_reply(reply)

    # ── loading ──

    def _agree(self, request: ModelTask, global_model: GlobalModel) -> LoraConfig:
        """Return what this client trains of a global model, if the run matches its configuration.

        Raises:
            ConfigError: If the run's method, objective, adapter or chat date is different.
            ModelError: If the model belongs to another base.
        """
        if global_model.method != repr(self.method):
            raise ConfigError(
                f"the run's method is {global_model.method}; [method] here gives {self.method!r}"
            )
        if request.objective != self.objective.settings:
            raise ConfigError(
                f"the run learns by {request.objective}; [training] here gives "
                f"{self.objective.settings}"
            )
        client_lora = self._agreed_lora(request.lora)
        check_chat_date(self.model.tokenizer, request.chat_date)
        global_model.base.check(self.model.identity)
        return client_lora

    def _load(
        self, task: Task, request: ModelTask, global_model: GlobalModel, client_lora: LoraConfig
    ) -> None:
        """Set the local model to a global model.

        Raises:
            ModelError: If the model belongs to another base.
        """
        self.model.load_global_model(global_model, self.method, client_lora)
        # A round's evaluation comes after its training.
        is_training = isinstance(request, TrainRequest)
        last_round = task.server_round - 1 if is_training else task.server_round
        self._load_personal(task.run_id, last_round, client_lora)

    def _agreed_lora(self, requested: ClientLora) -> LoraConfig:
        """Return the adapter configured here, at the rank to which the method has pruned it.

        Raises:
            ConfigError: If the server requests anything else.
        """
        client_lora = self.model.client_lora
        if self.method.prunes and requested.rank <= client_lora.rank:
            client_lora = client_lora.with_rank(requested.rank)
        configured = ClientLora.of(client_lora, self.model.is_mixed or self.method.prunes)
        if requested != configured:
            raise ConfigError(
                f"the run has this client train {msgspec.structs.asdict(requested)}; [lora] here "
                f"gives {msgspec.structs.asdict(configured)}"
            )
        return client_lora

    # ── personal factors ──

    def _load_personal(self, run_id: str, last_round: int, client_lora: LoraConfig) -> None:
        """Copy the client's own factors into the model, as they were after `last_round`.

        Raises:
            ModelError: If they are damaged, or do not match the adapter's shapes.
        """
        kinds = self.method.personal_factors
        if not kinds:
            return
        factors = self.store.load_state(PersonalFactors, run_id, self.client_id, last_round)
        if factors is not None:
            live = self.model.personal_factors(kinds)
            factors.copy_into(live, rank=client_lora.rank, scaling=client_lora.scaling)

    def _save_personal(self, task: Task, client_lora: LoraConfig) -> None:
        """Save the client's own factors after this round's training."""
        kinds = self.method.personal_factors
        if not kinds:
            return
        tensors = {}
        for name, factor in self.model.personal_factors(kinds).items():
            tensors[name] = factor.detach().cpu().clone()
        self.store.save_state(
            PersonalFactors(
                client=self.client_id,
                run_id=task.run_id,
                server_round=task.server_round,
                rank=client_lora.rank,
                scaling=client_lora.scaling,
                mixed=self.model.is_mixed or self.method.prunes,
                tensors=tensors,
            )
        )

    # ── the optimizer's moments ──

    def _start_moments(self, task: Task, request: TrainRequest) -> dict[str, Moments] | None:
        """Return the moments that the optimizer starts with; None to start fresh and report none.

        Raises:
            ModelError: If the client's own moments are damaged, or do not match the adapter.
            PayloadError: If the shared moments do not match the adapter.
        """
        if request.optimizer_state == "fresh":
            return None
        if request.optimizer_state == "local":
            last_round = task.server_round - 1
            state = self.store.load_state(LocalMoments, task.run_id, self.client_id, last_round)
            if state is None:
                return {}
            return state.start_moments(self.model.adapter(self.client_id).modules)
        # There are no shared moments before the first round has been aggregated.
        if request.moments is None:
            return {}
        shapes = {}
        for key, factor in self.model.personal_factors("BA").items():
            shapes[key] = (factor.shape[0], factor.shape[1])
        is_full = request.optimizer_state == "shared-full"
        stored = self.store.read(request.moments)
        return dict(SharedMoments.read(stored, shapes, is_full=is_full).moments)

    def _save_moments(
        self, task: Task, request: TrainRequest, moments: Mapping[str, Moments]
    ) -> None:
        """Save the client's own moments after this round's training.

        A factor that was not trained keeps its moments from an earlier round.
        """
        if request.optimizer_state != "local":
            return
        self.store.save_state(
            LocalMoments(
                client=self.client_id,
                run_id=task.run_id,
                server_round=task.server_round,
                factors=self.model.adapter(self.client_id).modules,
                moments=moments,
            )
        )
