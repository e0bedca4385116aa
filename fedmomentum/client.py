"""A client: its data, the model it trains, and `client_step`, from a task's bytes to a reply's.

One process loads the base once, however many clients it plays: `LocalModel` swaps adapters and adds what was merged
since. Every transport ends in `client_step`.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from torch import Tensor

from fedmomentum.adapter import Adapter, to_tensors
from fedmomentum.aggregation import Method
from fedmomentum.aggregation.factors import fresh_adapter
from fedmomentum.aggregation.whole import initialise, module_seed, start_of
from fedmomentum.base import HeldBase, load_base, load_tokenizer, pick_device, pick_dtype
from fedmomentum.chat_date import check_chat_date, set_chat_date
from fedmomentum.config import LoraConfig, ModelConfig
from fedmomentum.consolidation import remade
from fedmomentum.data.split import split_fingerprint
from fedmomentum.data.tokens import TokenisedExamples
from fedmomentum.diagnostics import BLOCK, applied_share, probe, probe_vectors, stack_probes
from fedmomentum.errors import ConfigError, FedMomentumError, MissingObject, ModelError
from fedmomentum.evaluation import Score, evaluate
from fedmomentum.global_model import Blob, GlobalModel, prune_objects, read_object, save_objects
from fedmomentum.identity import BaseIdentity, identify, resolve_base
from fedmomentum.loaded import vocabulary_size, within_memory
from fedmomentum.lowrank import LowRank
from fedmomentum.manifest import Recipe
from fedmomentum.messages import (
    BASE_PROBES,
    EFFECTIVE_PROBES,
    SECONDS,
    Answer,
    ClientLora,
    DescribeRequest,
    Description,
    EvaluateRequest,
    EvaluateResult,
    FreshAdapter,
    MissingObjects,
    Reply,
    ScoreSums,
    Task,
    TrainRequest,
    TrainResult,
    decode_task,
    encode_reply,
)
from fedmomentum.peft_live import ADAPTER_NAME, attach, detach, from_model, load_into, lora_layers
from fedmomentum.personal import PersonalFactors, keep_newest, load_personal, put_personal, save_personal
from fedmomentum.training import TrainReport
from fedmomentum.training import train as train_locally
from fedmomentum.wire import narrowed, rounded, rounding_error, wire_dtype

if TYPE_CHECKING:
    from fedmomentum.peft_live import PeftModel


LOG = logging.getLogger("fedmomentum")


def _attached(base: Any, lora: LoraConfig, seed: int) -> PeftModel:
    return attach(
        base, rank=lora.rank, lora_alpha=lora.lora_alpha, target_modules=lora.target_modules or None,
        dropout=lora.dropout, use_rslora=lora.use_rslora, modules_to_save=lora.modules_to_save, seed=seed,
    )  # fmt: skip


TrainFunction = Callable[..., TrainReport]
"""`function(model, examples, *, pad_token_id, learning_rate, local_steps, local_epochs, batch_size, seed, arguments,
on_step) -> TrainReport`: trains the model's trainable parameters in place. `fedmomentum.training.train` is one."""


@dataclass(frozen=True)
class LoadedBase:
    """A base model as it was loaded, for any number of `LocalModel`s of one process.

    Attributes:
        folder: where it lies.
        identity: which it is.
        tokenizer: its tokenizer.
        model: never trained nor changed itself.
    """

    folder: Path
    identity: BaseIdentity
    tokenizer: Any
    model: Any = field(repr=False)

    @classmethod
    def of(cls, model: ModelConfig) -> LoadedBase:
        """Find, identify and load the configuration's base.

        Raises:
            ModelError: it cannot be found or loaded.
        """
        folder = resolve_base(model.name, model.revision)
        device = pick_device(model.device)
        identity = identify(model.name, folder, model.revision)
        base = load_base(folder, pick_dtype(model.dtype, device), device)
        tokenizer = load_tokenizer(folder, vocabulary_size(base))
        set_chat_date(tokenizer, model.chat_date)
        return cls(folder, identity, tokenizer, base)

    def copy(self) -> Any:
        """Another model of the same tensors, to put an adapter on: only its modules are new."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return copy.deepcopy(self.model, {id(tensor): tensor for tensor in tensors})


class LocalModel:
    """The base model of this process with one live adapter, set to any global model at will.

    Args:
        model: which base, in what dtype, on what device.
        lora: the run's adapter; where `own` is given, that is what is attached here.
        seed: of the adapter's initialisation.
        own: what this party trains, if it is less.
        loaded: the base, where this process has it: its weights are shared, but for those of the adapted modules.

    Raises:
        ModelError: the base cannot be found or loaded.
        AdapterError: the adapter does not fit the base.
    """

    def __init__(
        self,
        model: ModelConfig,
        lora: LoraConfig,
        *,
        seed: int,
        own: LoraConfig | None = None,
        loaded: LoadedBase | None = None,
    ) -> None:
        loaded = loaded or LoadedBase.of(model)
        self.folder, self.identity, self.tokenizer = loaded.folder, loaded.identity, loaded.tokenizer
        base = loaded.copy()
        self.num_parameters = sum(p.numel() for p in base.parameters())
        self.dtype = base.dtype
        with within_memory(f"an adapter on {model.name} does not fit"):
            self.peft = _attached(base, lora, seed)
        self.fresh: Adapter = self.adapter("fresh adapter")
        self.own, self.is_mixed = replace(own or lora, clients={}), lora.is_mixed
        self._seed, self._trained = seed, replace(lora, clients={})
        self._layers = lora_layers(self.peft)
        self._train_as(self.own)
        if beyond := sorted(self._layers.keys() - self.fresh.modules.keys()):
            raise ConfigError(
                f"target-modules {self.own.target_modules} of a client adapt {beyond[0]}, which the run's own "
                "lora.target-modules leave out; a client can only train less than the run"
            )
        live = self.peft.get_base_model()
        layers = {module: live.get_submodule(module) for module in self.fresh.modules}
        self.held = HeldBase({m: getattr(layer, "base_layer", layer) for m, layer in layers.items()}, self.folder)
        self._blobs: dict[str, Blob] = {}
        self._beside: dict[str, LowRank] = {}
        self._scratch = torch.empty(BLOCK, dtype=torch.float64)
        self._vectors: tuple[int, dict[str, tuple[Tensor, Tensor]]] = (-1, {})
        self._merged: tuple[object, dict[str, Tensor], dict[str, Tensor]] = (None, {}, {})

    def _train_as(self, own: LoraConfig) -> None:
        """Have the adapter of these settings attached; the base stays the one that is in memory."""
        if own != self._trained:
            self.peft = _attached(detach(self.peft), own, self._seed)
            self._layers, self._trained = lora_layers(self.peft), own

    def adapter(self, name: str = "adapter") -> Adapter:
        """A copy of the live adapter."""
        return from_model(self.peft, name)

    def initial(self, method: Method) -> GlobalModel:
        """The global model before the first round: this base, the adapter that the method starts from."""
        adapter, change = initialise(method, self.fresh, self.held.pristine)
        config = {**self.fresh.config, "base_model_name_or_path": self.identity.name}
        adapter = replace(adapter, config=config, name="global adapter")
        merged = (Blob.of(change),) if change else ()
        return GlobalModel(self.identity, adapter, merged, method=repr(method), personal=method.personal)

    def become(self, model: GlobalModel, method: Method | None = None, own: LoraConfig | None = None) -> None:
        """Be this global model: its merged base, and of its adapter what this party trains, the rest beside the base.

        Args:
            model: the global model.
            method: says how a part is derived; needed where this party trains less than the whole.
            own: what is trained, where the method has pruned the rank of `self.own`.

        Raises:
            ModelError: it belongs to another base.
            AdapterError: its adapter has other modules, ranks or scalings than the one attached here.
        """
        model.base.check(self.identity)
        own = own or self.own
        self._train_as(own)
        start, self._beside = model.adapter, {}
        is_mixed = self.is_mixed or (method is not None and method.prunes)
        if method is not None and (is_mixed or self._layers.keys() != model.adapter.modules.keys()
                                   or own.scaling not in model.adapter.scalings.values()):  # fmt: skip
            start, self._beside = start_of(
                method, model.adapter, self._layers, rank=own.rank, scaling=own.scaling, is_mixed=is_mixed
            )
        beside = [Blob.of(self._beside)] if self._beside else []
        self.held.apply([*model.base_update, *beside])
        load_into(self.peft, start)

    @property
    def layers(self) -> Mapping[str, Any]:
        """The adapted modules' paths, and their live LoRA layers."""
        return self._layers

    def live(self) -> list[LowRank]:
        """The live factors themselves, module by module, with their gradients."""
        return [
            LowRank(layer.lora_B[ADAPTER_NAME].weight, layer.lora_A[ADAPTER_NAME].weight)
            for _, layer in sorted(self._layers.items())
        ]

    @contextmanager
    def training_only(self, factors: str) -> Iterator[None]:
        """Freeze the factors that are not named, for a while."""
        frozen = [getattr(factor, kind) for factor in self.live() for kind in "BA" if kind not in factors]
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)

    def fetch(self, store: Path) -> Callable[[str], Blob]:
        """A reader of a client's objects that parses and checks each once per process."""

        def read(name: str) -> Blob:
            if name in self._blobs:
                return self._blobs[name]
            blob = Blob(read_object(store, name))
            if blob.name == name:  # a damaged one is refused by whoever asked, and not kept for the others
                self._blobs[name] = blob
            return blob

        return read

    def forget(self, keep: set[str]) -> None:
        """Let go of all objects but these."""
        self._blobs = {name: blob for name, blob in self._blobs.items() if name in keep}

    def _probe_vectors(self, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Every module's probe vectors; those of the last seed are kept, since all clients of a round ask for them."""
        if self._vectors[0] != seed:
            shapes = {module: self.held.weight(module).shape for module in self.held.layers}
            self._vectors = seed, {m: probe_vectors(m, (shape[0], shape[1]), seed) for m, shape in shapes.items()}
        return self._vectors[1]

    def probes(self, seed: int) -> dict[str, dict[str, Tensor]]:
        """Probes of the live weights, in float64: `base` of W alone, `effective` of W + scaling B A.

        Measured anew in every call: nothing that was measured before stands for a weight that may have changed.
        """
        base, effective = {}, {}
        for module, (U, X) in self._probe_vectors(seed).items():
            base[module] = effective[module] = probe(self.held.weight(module), U, X, self._scratch)
            if (layer := self._layers.get(module)) is not None:
                lora = LowRank(layer.lora_B[ADAPTER_NAME].weight.detach(), layer.lora_A[ADAPTER_NAME].weight.detach())
                effective[module] = base[module] + layer.scaling[ADAPTER_NAME] * probe(lora, U, X)
            if module in self._beside:  # the adapter's, though it lies beside the base
                base[module] = base[module] - probe(self._beside[module], U, X)
        return {"base": base, "effective": effective}

    def applied_share(self, model: GlobalModel, probes: Mapping[str, Tensor], seed: int) -> float:
        """The share of `base_update` that is in the live base weights, by their probes; 1 where nothing is merged.

        What should be there, the weights on disk and what was merged, is the same for all clients of a round, and is
        measured once.
        """
        key = seed, [blob.name for blob in model.base_update]
        if self._merged[0] != key:
            vectors = self._probe_vectors(seed)
            modules = sorted({m for blob in model.base_update for m in blob.matrices})  # sums have an order
            stored = self.held.each_pristine(modules)
            pristine = {module: probe(weight, *vectors[module], self._scratch) for module, weight in stored}
            merged = {module: probe(model.merged(module), *vectors[module]) for module in modules}
            self._merged = key, pristine, merged
        _, pristine, merged = self._merged
        return applied_share({module: probes[module] - pristine[module] for module in merged}, merged)


@dataclass
class Client:
    """One party: its name, its tokenised data, and where it keeps the objects it was sent.

    Attributes:
        client_id: its name.
        train: what it trains on.
        test: what it holds out.
        method: the run's method, as this party's configuration has it; it says what is trained and what leaves.
        store: folder of its objects.
        owns_store: whether nobody else keeps objects there, so that what is no longer needed can go.
        keep_rounds: in a store of its own, after how many rounds its personal factors are kept, and one more.
        function: trains; the user's own, or ours.
        on_step: told of every training step: (client, step, steps, loss).
    """

    client_id: str
    train: TokenisedExamples
    test: TokenisedExamples
    method: Method
    store: Path
    owns_store: bool = False
    keep_rounds: int = 3
    function: TrainFunction = train_locally
    on_step: Callable[[str, int, int, float], None] | None = field(default=None, repr=False)
    _splits: dict[str, str] = field(init=False, repr=False, default_factory=dict)

    def split(self, run_id: str) -> str:
        """Return a hash of how the examples are divided into those trained on and those held out, for one run."""
        if run_id not in self._splits:
            self._splits[run_id] = split_fingerprint(self.train, self.test, run_id)
        return self._splits[run_id]


def client_step(payload: bytes, client: Client, model: LocalModel) -> bytes:
    """Answer one task: load the global model it names, train on or evaluate it, reply.

    Raises:
        PayloadError: If the bytes are no task.
        ModelError: If the task is for another base, or another version than stated comes out.
        FedMomentumError: If training or evaluation refuses.
    """
    task = decode_task(payload)
    if task.client_id != client.client_id:
        raise ModelError(f"a task for {task.client_id} came to {client.client_id}")
    request = task.request
    if isinstance(request, DescribeRequest):
        return _reply(task, client, "", [], *_describe(request, client, model))
    started = time.perf_counter()
    needed = set(request.manifest.needed)

    # Keep what came, and make what did not come: the adapter from its seed, snapshots from their parts.
    named = needed.union(*(recipe.fetched for recipe in request.recipes))
    save_objects({name: data for name, data in task.objects.items() if name in named}, client.store)
    fetch = model.fetch(client.store)
    if request.fresh is not None:
        _draw(request.fresh, needed, client, model)
    _make_snapshots(request.recipes, client, model)
    if missing := [name for name in sorted(needed) if not _is_whole(name, fetch)]:
        return _reply(task, client, "", sorted(needed - {*missing}), 1, MissingObjects(missing=missing), {})

    # Become the global model.
    current = GlobalModel.from_manifest(request.manifest, fetch, f"round {task.server_round}")
    if current.method != repr(client.method):
        raise ConfigError(f"the run's method is {current.method}; [method] here gives {client.method!r}")
    own = _own(request.lora, client.method, model)
    check_chat_date(model.tokenizer, request.chat_date)
    model.become(current, client.method, own)
    is_training = isinstance(request, TrainRequest)
    _put_personal(task, client, model, own, is_training=is_training)
    model.forget(needed)
    if client.owns_store:
        prune_objects(client.store, needed)
    loaded = time.perf_counter()

    answer: Answer
    if isinstance(request, TrainRequest):
        num_examples, answer, tensors = _train(task.server_round, request, client, model)
        _keep_personal(task, client, model, own)
    else:
        num_examples, answer, tensors = _evaluate(request, client, model, current)
    tensors[SECONDS] = torch.tensor([loaded - started, time.perf_counter() - loaded], dtype=torch.float64)
    return _reply(task, client, current.version, sorted(needed), num_examples, answer, tensors)


def _reply(
    task: Task,
    client: Client,
    version: str,
    holds: list[str],
    num_examples: int,
    answer: Answer,
    tensors: dict[str, Tensor],
) -> bytes:
    split = client.split(task.run_id)
    reply = Reply(
        task.run_id, client.client_id, task.server_round, version, holds, num_examples, split, answer, tensors
    )
    return encode_reply(reply)


def _own(asked: ClientLora, method: Method, model: LocalModel) -> LoraConfig:
    """What this client trains or evaluates now: what is configured here, at the rank to which the method pruned it.

    Raises:
        ConfigError: the server asks for something else.
    """
    own = model.own
    if method.prunes and asked.rank <= own.rank:
        own = own.at_rank(asked.rank)
    if asked != (here := ClientLora.of(own, model.is_mixed or method.prunes)):
        wanted = msgspec.structs.asdict(asked)
        raise ConfigError(f"the run has this client train {wanted}; [lora] here gives {msgspec.structs.asdict(here)}")
    return own


def _is_whole(name: str, fetch: Callable[[str], Blob]) -> bool:
    """Whether an object is there, undamaged."""
    try:
        return fetch(name).name == name
    except MissingObject:
        return False


def _make_snapshots(recipes: Sequence[Recipe], client: Client, model: LocalModel) -> None:
    """Make the snapshots that are not here and whose parts are: if the bits are the wanted ones, so is the hash.

    What comes out otherwise is dropped; the snapshot is then lacking, and the server sends it.
    """
    fetch, shapes = model.fetch(client.store), {m: matrix.shape for m, matrix in model.fresh.modules.items()}
    if recipes and _is_whole(name := recipes[-1].makes, fetch):
        save_objects({name: fetch(name).data}, client.store)  # another client of this process may have made it
        return
    for recipe in recipes:
        sources = (*recipe.summed, recipe.ties)
        if _is_whole(recipe.makes, fetch) or not all(_is_whole(name, fetch) for name in sources):
            continue
        try:
            made = remade([fetch(name) for name in recipe.summed], fetch(recipe.ties), shapes)
        except FedMomentumError as error:
            LOG.warning("the snapshot %s... cannot be made here: %s", recipe.makes[:16], error)
            continue
        if made.name == recipe.makes:
            save_objects({made.name: made.data}, client.store)
        else:
            LOG.warning("the snapshot %s... came out as %s...; it is asked for", recipe.makes[:16], made.name[:16])


def _draw(fresh: FreshAdapter, needed: set[str], client: Client, model: LocalModel) -> None:
    """Make the adapter that needs no sending, from the seed: if its bits are the wanted ones, their hashes are."""
    modules = {}
    for module, matrix in model.fresh.modules.items():
        generator = torch.Generator().manual_seed(module_seed(fresh.seed, fresh.server_round, module))
        modules[module] = fresh_adapter(matrix.shape, matrix.rank, generator, dtype=torch.float32)
    adapter = replace(model.fresh, modules=modules, saved={})
    drawn = GlobalModel(model.identity, adapter, adapter_dtype=wire_dtype(fresh.dtype)).adapter_objects.values()
    save_objects({blob.name: blob.data for blob in drawn if blob.name in needed}, client.store)


def _own_factors(client: Client, model: LocalModel) -> dict[str, Tensor]:
    """Return the live factors that this client shares with nobody, by `<module>.B` or `<module>.A`."""
    return {
        f"{module}.{kind}": getattr(matrix, kind)
        for module, matrix in zip(sorted(model.layers), model.live(), strict=True)
        for kind in client.method.personal
    }


def _put_personal(task: Task, client: Client, model: LocalModel, own: LoraConfig, *, is_training: bool) -> None:
    """Put the client's own factors in place, as its last training before this task left them.

    Raises:
        ModelError: If they are damaged, or of another form than the adapter.
    """
    if not client.method.personal:
        return
    last_round = task.server_round - 1 if is_training else task.server_round
    factors = load_personal(client.store, task.run_id, client.client_id, last_round)
    if factors is not None:
        put_personal(factors, _own_factors(client, model), rank=own.rank, scaling=own.scaling)


def _keep_personal(task: Task, client: Client, model: LocalModel, own: LoraConfig) -> None:
    """Keep them by round, so that a round that is made again starts where it did.

    In a run's directory its checkpoints decide which rounds are kept; a store that is the client's own keeps the last.
    """
    if not client.method.personal:
        return
    tensors = {name: factor.detach().cpu().clone() for name, factor in _own_factors(client, model).items()}
    is_mixed = model.is_mixed or client.method.prunes
    save_personal(
        client.store,
        PersonalFactors(client.client_id, task.run_id, task.server_round, own.rank, own.scaling, is_mixed, tensors),
    )
    if client.owns_store:
        keep_newest(client.store, task.run_id, client.client_id, client.keep_rounds + 1)


def _describe(
    request: DescribeRequest, client: Client, model: LocalModel
) -> tuple[int, Description, dict[str, Tensor]]:
    """Say what the server needs to know before the first round; with the fresh adapter if it asks for that."""
    fresh = model.initial(client.method).adapter if request.adapter else model.fresh
    description = Description(
        sha256=model.identity.sha256 or "",
        tokenizer_sha256=model.identity.tokenizer_sha256 or "",
        num_parameters=model.num_parameters,
        num_train=len(client.train),
        num_test=len(client.test),
        versions={name: installed(name) for name in ("fedmomentum", "torch", "transformers", "peft")},
        threads=torch.get_num_threads(),
        dtype=str(model.dtype).removeprefix("torch."),
        # What the client calls its base may be a path; the server has a name of its own for it.
        adapter_config={**fresh.config, "base_model_name_or_path": None},
        scalings=dict(fresh.scalings),
        shapes={module: matrix.shape for module, matrix in fresh.modules.items()},
        saved_shapes={name: list(tensor.shape) for name, tensor in fresh.saved.items()},
    )
    return max(1, len(client.train)), description, to_tensors(fresh) if request.adapter else {}


@cache
def installed(package: str) -> str:
    """The version of a package that is installed here."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _train(
    server_round: int, request: TrainRequest, client: Client, model: LocalModel
) -> tuple[int, TrainResult, dict[str, Tensor]]:
    """Train the adapter, and measure the weights that came of it."""
    dtype = wire_dtype(request.uplink_dtype)

    def on_step(step: int, steps: int, loss: float) -> None:
        if client.on_step:
            client.on_step(client.client_id, step, steps, loss)

    method = client.method
    penalty = {"penalty": lambda: method.penalty(model.live())} if _penalises(method, model) else {}
    before = [LowRank(m.B.detach().clone(), m.A.detach().clone()) for m in model.live()] if method.prunes else []
    with model.training_only(method.trains(server_round)):
        report = client.function(
            model.peft,
            client.train,
            pad_token_id=model.tokenizer.pad_token_id,
            on_step=on_step,
            learning_rate=request.learning_rate,
            local_steps=request.local_steps,
            local_epochs=request.local_epochs,
            batch_size=request.batch_size,
            arguments=request.arguments,
            seed=request.seed,
            **penalty,
        )
    _check_report(report, client.function)

    # What leaves: the factors that the method uploads, in the wire's dtype.
    trained = model.adapter(client.client_id)
    uploads = method.uploads(server_round)
    kept_back = [f".lora_{factor}." for factor in "BA" if factor not in uploads]
    sent = {name: t for name, t in to_tensors(trained).items() if not any(kind in name for kind in kept_back)}
    tensors = narrowed(sent, dtype)
    next_rank = None
    if method.prunes:
        with torch.no_grad():
            next_rank = method.next_rank(request.lora.rank, before, model.live())
    result = TrainResult(
        **asdict(report), rounding=rounding_error(trained, rounded(trained, dtype)), next_rank=next_rank
    )
    probes = model.probes(request.probe_seed)
    tensors[BASE_PROBES] = stack_probes(probes["base"])
    tensors[EFFECTIVE_PROBES] = stack_probes(probes["effective"])
    return len(client.train), result, tensors


def _check_report(report: Any, function: Callable[..., Any]) -> None:
    """Refuse what a user's own training function must not return.

    Raises:
        ConfigError: If it is no `TrainReport`, or one with a loss that is not finite.
    """
    if not isinstance(report, TrainReport):
        raise ConfigError(
            f"the training function {function!r} returned {type(report).__name__}; wanted a "
            "fedmomentum.training.TrainReport"
        )
    for name in ("loss", "first_loss", "last_loss"):
        value = getattr(report, name)
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ConfigError(f"the training function {function!r} reported {name} = {value!r}; wanted a finite number")


def _penalises(method: Method, model: LocalModel) -> bool:
    return method.penalty(model.live()) is not None


def _evaluate(
    request: EvaluateRequest, client: Client, model: LocalModel, current: GlobalModel
) -> tuple[int, EvaluateResult, dict[str, Tensor]]:
    """Score the model on the first of the client's held-out examples, and measure the weights that it loaded."""
    tensors = {}
    share = None
    if request.probe_seed is not None:
        probes = model.probes(request.probe_seed)
        tensors[BASE_PROBES] = stack_probes(probes["base"])
        tensors[EFFECTIVE_PROBES] = stack_probes(probes["effective"])
        if current.base_update:
            share = model.applied_share(current, probes["base"], request.probe_seed)

    # The examples that every evaluation of the run has in common, then the others.
    split = min(request.num_compared, request.num_examples)
    scored = [
        evaluate(model.peft, part, pad_token_id=model.tokenizer.pad_token_id, batch_size=request.batch_size)
        for part in (_part(client.test, 0, split), _part(client.test, split, request.num_examples))
        if len(part)
    ]
    if not scored:
        return 1, EvaluateResult(applied_share=share), tensors
    whole = scored[0] + scored[1] if len(scored) == 2 else scored[0]
    result = EvaluateResult(
        applied_share=share,
        compared=_sums(scored[0].total),
        total=_sums(whole.total),
        by_category={category: _sums(score) for category, score in sorted(whole.by_category.items())},
    )
    return whole.total.num_examples, result, tensors


def _part(examples: TokenisedExamples, start: int, end: int) -> TokenisedExamples:
    return replace(
        examples,
        input_ids=examples.input_ids[start:end],
        num_prompt_tokens=examples.num_prompt_tokens[start:end],
        categories=examples.categories[start:end],
        is_truncated=examples.is_truncated[start:end],
    )


def _sums(score: Score) -> ScoreSums:
    return ScoreSums(**{key: getattr(score, key) for key in ("nll", "num_tokens", "num_examples", "num_exact")})
