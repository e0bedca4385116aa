"""Configuration in, run folder out: puts the pieces of a run together; the round is `rounds`."""

from __future__ import annotations

import logging
import math
import os
import platform
import random
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch

from fedmomentum.adapter import Adapter
from fedmomentum.aggregation import Method, build_method
from fedmomentum.checkpoint import RunFolder, ServerState, committed_rows, saved_settings
from fedmomentum.client import Client, LoadedBase, LocalModel, TrainFunction, client_step, installed
from fedmomentum.config import LOCATIONS, MAY_CHANGE, Config, LoraConfig, differences, to_toml
from fedmomentum.data.clients import load_clients, partition_table
from fedmomentum.data.examples import ClientData, Example
from fedmomentum.data.tokens import TokenisedExamples, tokenise
from fedmomentum.enrolment import enrol
from fedmomentum.errors import AdapterError, ConfigError, ModelError
from fedmomentum.folders import kept_rounds, read_manifest, round_file
from fedmomentum.global_model import GlobalModel
from fedmomentum.identity import BaseIdentity
from fedmomentum.loaded import check_max_length, check_token_ids, max_positions
from fedmomentum.manifest import Fingerprint, as_manifest
from fedmomentum.messages import ClientLora, Description, Task, encode_task
from fedmomentum.origin import check_data, fingerprints, follow, refuse_missing
from fedmomentum.personal import check_personal, drop_later
from fedmomentum.plugins import imported
from fedmomentum.rounds import Observer, derive, run_rounds, train_request
from fedmomentum.run_files import EnvironmentFile, read_facts
from fedmomentum.tracking import check_trackers, reported
from fedmomentum.training import train
from fedmomentum.training_arguments import check_amount, check_arguments
from fedmomentum.transport import InProcessTransport, Transport
from fedmomentum.wire import wire_dtype

LOG = logging.getLogger("fedmomentum")
NOTHING = TokenisedExamples((), (), (), (), 0)
PACKAGES = ("fedmomentum", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "numpy")


@dataclass(frozen=True)
class Plan:
    """What a run will cost, said before it starts. Bytes are estimates from above; `metrics.jsonl` has the real ones.

    Attributes:
        model: the base's name.
        num_parameters: of the base.
        num_trained: of the adapter.
        num_clients: parties.
        num_rounds: rounds.
        method: its `repr`.
        uplink_bytes: per client and round.
        downlink_bytes: per client and round: the adapter and the most the residual can be.
        memory_bytes: of this process, about.
        disk_bytes: of the run folder, at most.
        warnings: what the user should know before it starts.
    """

    model: str
    num_parameters: int
    num_trained: int
    num_clients: int
    num_rounds: int
    method: str
    uplink_bytes: int
    downlink_bytes: int
    memory_bytes: int
    disk_bytes: int
    warnings: tuple[str, ...]


@dataclass
class Run:
    """A run that is ready to start: everything is loaded and checked, nothing is trained yet."""

    config: Config
    method: Method
    folder: RunFolder
    local: LocalModel
    locals: dict[str, LocalModel]
    clients: list[Client]
    model: GlobalModel
    state: ServerState
    plan: Plan
    partition: dict[str, dict[str, dict[str, int]]]
    data: dict[str, Fingerprint]

    def start(self, observer: Observer) -> GlobalModel:
        """Run the rounds that are left.

        Raises:
            QuorumError: see `run_rounds`.
        """
        now = environment(self.local)
        if self.folder.rows:
            _warn_of_another_environment(now, self.folder.folder)
        self.folder.describe(
            to_toml(self.config),
            self.state.run_id,
            plan=asdict(self.plan),
            partition=self.partition,
            environment=now,
            data=self.data,
        )
        transport = InProcessTransport(
            {c.client_id: partial(client_step, client=c, model=self.locals[c.client_id]) for c in self.clients}
        )
        with reported(self.config.run.report_to, self.folder, self.state.run_id, observer) as observe:
            return run_rounds(
                transport, method=self.method, model=self.model, state=self.state, config=self.config,
                folder=self.folder, observer=observe,
            )  # fmt: skip

    def close(self) -> None:
        """Let go of the run folder."""
        self.folder.close()


@dataclass(frozen=True)
class _Loaded:
    """What a run on this machine is made of, before its directory is opened."""

    config: Config
    method: Method
    local: LocalModel
    locals: dict[str, LocalModel]
    clients: list[Client]
    parties: list[ClientData]
    data: dict[str, Fingerprint]


def prepare(
    config: Config,
    out: Path,
    *,
    resume: bool = False,
    server_round: int | None = None,
    on_step: Callable[[str, int, int, float], None] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Run:
    """Read the data, load the model, open the folder.

    Args:
        config: the run.
        out: its folder.
        resume: go on with what is in `out`; without it `out` must be new or empty.
        server_round: resume from this round instead of the last one; the rounds after it are done again.
        on_step: told of every training step: (client, step, steps, loss).
        say: told in a line what is being done.

    Raises:
        ConfigError: settings that contradict each other, or a run folder of other settings.
        DataError: data that cannot be used, or other data than the run began with.
        ModelError: a base that cannot be loaded; a folder that is in use or holds something else.
    """
    loaded = _load(config, out, resume=resume, server_round=server_round, on_step=on_step, say=say)
    config, method, local = loaded.config, loaded.method, loaded.local
    folder = RunFolder(out, keep=config.run.keep_rounds)
    try:
        if resume and server_round is not None:  # what comes after that round is about to go
            _check_made_from(out, server_round, loaded)
        resumed = folder.resume(server_round) if resume else None
        if resumed:
            model, state = resumed
            _check_made_from(out, model.server_round, loaded)
            drop_later(out, state.run_id, model.server_round)
        else:
            model = local.initial(method).sent_in(wire_dtype(config.federation.downlink_dtype))
            state = ServerState(secrets.token_hex(16))
        plan = make_plan(config, local, model, loaded.clients, method)
    except BaseException:
        folder.close()
        raise
    return Run(
        config, method, folder, local, loaded.locals, loaded.clients, model, state, plan,
        partition_table(loaded.parties), loaded.data,
    )  # fmt: skip


def _check_made_from(out: Path, server_round: int, loaded: _Loaded) -> None:
    """Refuse to go on from a round with another base, other data, or without the clients' own factors.

    Raises:
        DataError: If the data is other data.
        ModelError: If the base is another, a client's own factors are missing or damaged, or the checkpoint is.
    """
    if server_round not in kept_rounds(out):
        return  # for `RunFolder.resume` to say
    manifest = read_manifest(round_file(out, server_round))
    base = manifest.base
    BaseIdentity(base.name, base.revision, base.sha256, base.tokenizer_sha256).check(loaded.local.identity)
    check_data(out, loaded.data, server_round)
    if loaded.method.personal and manifest.run is not None:
        check_personal(out, manifest.run.run_id, _last_trained(committed_rows(out, server_round)))


def plan_run(
    config: Config,
    out: Path,
    *,
    resume: bool = False,
    server_round: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Plan, list[Client]]:
    """Make the plan of a run without touching its directory, whether or not there is a run in it already.

    Args:
        config: The run.
        out: Its directory.
        resume: Check the settings and the data against those of the run in `out`.
        server_round: As in `prepare`.
        say: Told in a line what is being done.

    Raises:
        FedMomentumError: See `prepare`.
    """
    loaded = _load(config, out, resume=resume, server_round=server_round, is_plan=True, say=say)
    rounds = kept_rounds(out)
    if resume and rounds:
        _check_made_from(out, rounds[-1] if server_round is None else server_round, loaded)
    model = loaded.local.initial(loaded.method).sent_in(wire_dtype(config.federation.downlink_dtype))
    plan = make_plan(loaded.config, loaded.local, model, loaded.clients, loaded.method)
    if not resume and (out / "config.toml").is_file():
        there = f"{out} holds a run already; without --resume, or another --out, this run would be refused"
        plan = replace(plan, warnings=(*plan.warnings, there))
    return plan, loaded.clients


def _load(
    config: Config,
    out: Path,
    *,
    resume: bool,
    server_round: int | None = None,
    is_plan: bool = False,
    on_step: Callable[[str, int, int, float], None] | None = None,
    say: Callable[[str], None],
) -> _Loaded:
    """Check the settings, read the data and load the model; see `prepare`."""
    method = make_method(config)
    check_arguments(config.training.arguments)
    check_trackers(config.run.report_to)
    function = _training_function(config)
    if resume:
        config = follow(config, out)
        refuse_missing(config)
    if resume or not is_plan:
        _check_folder(config, out, resume, server_round)
    set_threads(config.run.threads)
    seed = config.run.seed
    say("Reading the data")
    parties = load_data(config)
    say(f"Loading {config.model.name}")
    base = LoadedBase.of(config.model)
    local = LocalModel(config.model, config.lora, seed=derive(seed, "adapter"), loaded=base)
    clients = _tokenised(config, parties, local, out, function, on_step)
    locals_ = _own_models(config, local, base, [client.client_id for client in clients])
    data = fingerprints(parties, {client.client_id: (client.train, client.test) for client in clients})
    return _Loaded(config, method, local, locals_, clients, parties, data)


def set_threads(threads: int) -> None:
    """Have torch use so many threads; 0: as many as there are cores."""
    torch.set_num_threads(threads if threads > 0 else os.cpu_count() or 1)


def _last_trained(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return the clients whose training has counted in a run, each with the last round in which it did."""
    found = {}
    for row in rows:
        for client in row["accepted"]:
            found[client] = row["round"]
    return found


def _own_models(config: Config, local: LocalModel, loaded: LoadedBase, names: Sequence[str]) -> dict[str, LocalModel]:
    """A model for each thing that clients train: one for all, unless some train less; all on one base."""
    lora = config.lora
    if unknown := sorted(set(lora.clients) - set(names)):
        raise ConfigError(f"lora.clients names {unknown[0]}, which is no client; there are {', '.join(names)}")
    made: list[tuple[LoraConfig, LocalModel]] = [(lora.of(""), local)]
    found = {}
    for name in names:
        own = lora.of(name)
        if not any(own == other for other, _ in made):
            seed = derive(config.run.seed, "adapter")
            try:
                made.append((own, LocalModel(config.model, lora, seed=seed, own=own, loaded=loaded)))
            except (AdapterError, ConfigError) as error:
                raise ConfigError(f"lora.clients.{name}: {error}") from error
        found[name] = next(model for other, model in made if other == own)
    return found


def party_names(config: Config) -> list[str]:
    """The parties that the configuration's data is divided among, sorted."""
    return sorted(config.data.client_files) or [party.client_id for party in load_data(config)]


def prepare_party(
    config: Config,
    client_id: str,
    store: Path,
    *,
    local: LocalModel | None = None,
    on_step: Callable[[str, int, int, float], None] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Client, LocalModel]:
    """Read one party's own data and load its model: what a run over a network needs on that party's machine.

    Args:
        config: `[model]`, `[lora]`, `[data]`, `[training]` and `[run]` count here.
        client_id: the party's name. Of several `data.client-files` only its own is read; a source that is divided
            among clients is read whole, and its share taken.
        store: folder that will keep the objects it is sent, under `objects`; made if it is not there.
        local: the model, where this process has it already.
        on_step: told of every training step: (client, step, steps, loss).
        say: told in a line what is being done.

    Raises:
        ConfigError: settings that contradict each other, or that have no data for this client.
        DataError: data that cannot be used.
        ModelError: a base that cannot be loaded.
    """
    check_arguments(config.training.arguments)
    function = _training_function(config)
    set_threads(config.run.threads)
    if (files := config.data.client_files) and client_id in files:
        config = replace(config, data=replace(config.data, client_files={client_id: files[client_id]}))
    elif files:
        raise ConfigError(f"data.client-files names {', '.join(sorted(files))}; this client is {client_id}")
    say("Reading the data")
    parties = {party.client_id: party for party in load_data(config)}
    if client_id not in parties:
        raise ConfigError(f"the data is divided among {', '.join(parties)}; this client is {client_id}")
    if local is None:
        say(f"Loading {config.model.name}")
        own = config.lora.of(client_id)
        local = LocalModel(config.model, config.lora, seed=derive(config.run.seed, "adapter"), own=own)
    (client,) = _tokenised(config, [parties[client_id]], local, store, function, on_step)
    client.owns_store = True
    return client, local


def rehearsal(config: Config, client: Client, local: LocalModel) -> bytes:
    """A task to train the untouched model for one step: what a first round would ask, made here."""
    model = local.initial(client.method)
    lora = ClientLora.of(local.own, local.is_mixed or client.method.prunes)
    manifest = as_manifest(model.manifest(), "the untouched model")
    request = train_request(config, 1, client.client_id, config.training.learning_rate, lora, manifest)
    one_step = msgspec.structs.replace(request, local_steps=1, local_epochs=None)
    return encode_task(Task("rehearsal", client.client_id, 1, one_step, model.objects()))


def run_over(
    transport: Transport,
    config: Config,
    out: Path,
    *,
    resume: bool = False,
    server_round: int | None = None,
    observer: Observer = lambda event, facts: None,
    data: Mapping[str, Fingerprint] | None = None,
) -> GlobalModel:
    """Run a federation whose clients are elsewhere; neither data nor base model are needed here.

    Args:
        transport: reaches the clients.
        config: the run; `[data]` does not count here, unless `data` is given.
        out: its folder.
        resume: go on with what is in `out`; without it `out` must be new or empty.
        server_round: resume from this round instead of the last one; the rounds after it are done again.
        observer: told of progress, and of the plan: `("plan", asdict(plan))`.
        data: fingerprints of the clients' data, where this process knows it.

    Raises:
        ConfigError: settings that contradict each other, or a run folder of other settings.
        DataError: other data than the run began with.
        ModelError: a folder that is in use or holds something else.
        QuorumError: see `run_rounds` and `enrol`.
    """
    method = make_method(config)
    check_arguments(config.training.arguments)
    check_trackers(config.run.report_to)
    _check_folder(config, out, resume, server_round, data_counts=data is not None)
    set_threads(config.run.threads)
    folder = RunFolder(out, keep=config.run.keep_rounds)
    try:
        resumed = folder.resume(server_round) if resume else None
        if resumed:
            model, state = resumed
            if data is not None:
                check_data(out, data, server_round)
            folder.describe(to_toml(config), state.run_id, data=data)
        else:
            state = ServerState(secrets.token_hex(16))
            enrolment = enrol(transport, config, state.run_id, method)
            model, facts = enrolment.model.sent_in(wire_dtype(config.federation.downlink_dtype)), enrolment.facts
            plan = served_plan(config, model, method, facts)
            observer("plan", asdict(plan))
            folder.describe(
                to_toml(config),
                state.run_id,
                plan=asdict(plan),
                partition={c: {"train": {"": f.num_train}, "test": {"": f.num_test}} for c, f in facts.items()},
                environment={
                    **_here(),
                    "base_sha256": model.base.sha256,
                    "tokenizer_sha256": model.base.tokenizer_sha256,
                    "clients": {c: f"{f.threads} threads, {f.dtype}, {f.versions}" for c, f in facts.items()},
                },
                data=data,
            )
        with reported(config.run.report_to, folder, state.run_id, observer) as observe:
            return run_rounds(
                transport, method=method, model=model, state=state, config=config, folder=folder, observer=observe
            )
    finally:
        folder.close()


def make_method(config: Config) -> Method:
    """The method of the configuration.

    Raises:
        ConfigError: an unknown name or setting, or a value that the method refuses.
    """
    method = build_method(config.method.name, {k.replace("-", "_"): v for k, v in config.method.settings.items()})
    if config.lora.is_mixed and not method.unequal_ranks:
        raise ConfigError(f"{method.title} needs every client at one rank; lora.clients gives several")
    if method.reads_base and config.federation.downlink_dtype != "float32":
        raise ConfigError(f"{method.title} starts from the base's own directions; they need downlink-dtype float32")
    return method


def _training_function(config: Config) -> TrainFunction:
    """Our trainer, or the user's `module:function`."""
    if config.training.function is None:
        return train
    function: TrainFunction = imported(config.training.function, "training.function")
    return function


def _check_folder(
    config: Config, out: Path, resume: bool, server_round: int | None = None, *, data_counts: bool = True
) -> None:
    """A fresh run wants a fresh folder; a resumed one its own settings. Where things are may have changed."""
    if not resume:
        if (out / "config.toml").is_file() or kept_rounds(out):
            raise ModelError(f"{out} holds a run already; go on with it by --resume, or choose another --out")
        if out.is_dir() and any(
            file.name not in (".lock", "rounds", "server.log", "status.json") for file in out.iterdir()
        ):
            raise ModelError(f"{out} is not empty and holds no run; choose another --out")
        return
    began = saved_settings(out, server_round)
    if began is None:
        return
    changed = [key for key in differences(began, config) if key not in MAY_CHANGE]
    if not data_counts:
        changed = [key for key in changed if not key.startswith("data.")]
    else:  # the content is compared
        changed = [key for key in changed if key not in LOCATIONS]
        if began.data.client_files.keys() != config.data.client_files.keys():
            changed.append("data.client-files")
    if changed:
        raise ConfigError(
            f"{out} was made with other settings; these differ: {', '.join(changed)}. Resume with its own settings, "
            f"{out / 'config.toml'} as the run wrote it (its checkpoints hold them too), or start anew in another --out"
        )


def load_data(config: Config) -> list[ClientData]:
    """Every client's examples, as `[data]` has them.

    Raises:
        ConfigError: no data is named.
        DataError: data that cannot be used.
    """
    data = config.data
    if not data.source and not data.client_files:
        raise ConfigError("data.source must be given, or data.client-files; got neither")
    return load_clients(
        source=data.source or None, client_files=data.client_files or None, client_column=data.client_column,
        test_source=data.test_source, test_fraction=data.test_fraction, tasks=data.tasks or None,
        num_examples=data.num_examples, num_test_examples=data.num_test_examples, num_clients=data.num_clients,
        how=data.partition, category_column=data.category_column, concentration=data.concentration,
        min_examples=data.min_examples, categories_per_client=data.categories_per_client,
        sizes=data.sizes or None, split=data.split, test_split=data.test_split,
        seed=derive(config.run.seed, "data"),
    )  # fmt: skip


def held_out_order(config: Config, party: ClientData) -> list[Example]:
    """A client's held-out examples in the drawn order in which evaluations take them."""
    test = list(party.test)
    random.Random(derive(config.run.seed, "test order", party.client_id)).shuffle(test)
    return test


def _tokenised(
    config: Config,
    parties: Sequence[ClientData],
    local: LocalModel,
    out: Path,
    function: TrainFunction,
    on_step: Callable[[str, int, int, float], None] | None,
) -> list[Client]:
    """Each client's examples as tokens, once for the whole run; held-out ones in a drawn order."""
    limits: dict[str, Any] = {"max_length": config.data.max_length, "max_lost_share": config.data.max_lost_share}
    base = local.peft.get_base_model()
    check_max_length(base, config.data.max_length)
    training = config.training
    clients = []
    for party in parties:
        test = held_out_order(config, party)
        held_out = f"{party.client_id} (held out)"
        train_tokens = tokenise(party.train, local.tokenizer, owner=party.client_id, **limits)
        test_tokens = tokenise(test, local.tokenizer, owner=held_out, **limits) if test else NOTHING
        check_token_ids(base, train_tokens.input_ids, party.client_id)
        check_token_ids(base, test_tokens.input_ids, held_out)
        check_amount(
            len(train_tokens),
            local_steps=training.local_steps,
            local_epochs=training.local_epochs,
            batch_size=training.batch_size,
            arguments=training.arguments,
            owner=party.client_id,
        )
        clients.append(
            Client(
                party.client_id,
                train_tokens,
                test_tokens,
                method=make_method(config),
                store=out,
                keep_rounds=config.run.keep_rounds,
                function=function,
                on_step=on_step,
            )
        )
    return clients


def make_plan(config: Config, local: LocalModel, model: GlobalModel, clients: Sequence[Client], method: Method) -> Plan:
    """The plan of a run on this machine; see `Plan`."""
    traffic = _traffic(config, model.adapter, method, len(clients))
    longest = max(len(ids) for client in clients for ids in client.train.input_ids)
    text = local.peft.config.get_text_config()
    width = getattr(text, "hidden_size", 1024) * getattr(text, "num_hidden_layers", 24)
    activations = config.training.batch_size * longest * (24 * width * local.dtype.itemsize + 4 * 1024)
    weights = local.num_parameters * local.dtype.itemsize + (traffic.dense if local.dtype.itemsize < 4 else 0)
    warnings = []
    short = [c.client_id for c in clients if len(c.train) < config.training.batch_size]
    if short:
        warnings.append(f"fewer examples than a batch: {', '.join(short[:5])}{' ...' if len(short) > 5 else ''}")
    if config.evaluation.every and not any(len(client.test) for client in clients):
        warnings.append("no client holds out examples; nothing will be evaluated")
    positions, _ = max_positions(local.peft.get_base_model())
    if positions is not None and longest > positions:
        warnings.append(
            f"the longest example has {longest} tokens and the model was made for {positions}; "
            f"data.max-length = {positions} cuts them"
        )
    memory = weights + 4 * traffic.uplink + activations + 700 * 2**20
    return _plan(config, model, method, traffic, len(clients), local.num_parameters, memory, warnings)


def served_plan(config: Config, model: GlobalModel, method: Method, facts: Mapping[str, Description]) -> Plan:
    """The plan of a run over a network; its memory is the server's."""
    traffic = _traffic(config, model.adapter, method, len(facts))
    warnings = []
    short = [client for client, fact in facts.items() if fact.num_train < config.training.batch_size]
    if short:
        warnings.append(f"fewer examples than a batch: {', '.join(short[:5])}{' ...' if len(short) > 5 else ''}")
    if config.evaluation.every and not any(fact.num_test for fact in facts.values()):
        warnings.append("no client holds out examples; nothing will be evaluated")
    # updates are on disk: in memory are a reply as bytes and tensors, what is sent in the message store and as it is
    # encoded, the base update and what a round makes of it as bytes and tensors, and one module's sum at work
    memory = 3 * traffic.uplink + 4 * traffic.adapter + 8 * traffic.residual + 2 * _update_bytes(config, traffic)
    memory += 4 * traffic.largest_sum + 400 * 2**20
    parameters = max(fact.num_parameters for fact in facts.values())
    return _plan(config, model, method, traffic, len(facts), parameters, memory, warnings)


@dataclass(frozen=True)
class _Traffic:
    """Bytes: of an adapter either way, of the most that a round's residual can be, of one dense matrix a module.

    And of the largest module's sum in float64, and of all updates of a round.
    """

    uplink: int
    adapter: int
    residual: int
    dense: int
    largest_sum: int
    spool: int


def _traffic(config: Config, adapter: Adapter, method: Method, num_clients: int) -> _Traffic:
    up, down = wire_dtype(config.federation.uplink_dtype), wire_dtype(config.federation.downlink_dtype)
    rank, asked = config.lora.rank, max(1, math.ceil(config.federation.participation * num_clients - 1e-9))
    residual = dense = largest_sum = 0
    for matrix in adapter.modules.values():
        out_size, in_size = matrix.shape
        largest = asked * rank + (2 * rank if down.itemsize < 4 else 0)  # rounding an adapter adds twice its rank
        factors = (out_size + in_size) * (min(largest, out_size, in_size) - rank)
        residual += 4 * min(factors, out_size * in_size) if method.exact else 0
        dense += 4 * out_size * in_size
        largest_sum = max(largest_sum, 8 * min((out_size + in_size) * asked * rank, out_size * in_size))
    numbers = adapter.num_numbers()
    spool = 4 * asked * numbers  # widened to float32
    return _Traffic(up.itemsize * numbers, down.itemsize * numbers, residual, dense, largest_sum, spool)


def _update_bytes(config: Config, traffic: _Traffic) -> int:
    """The most that `base_update` can come to."""
    return min(2 * traffic.dense, config.federation.num_rounds * traffic.residual)


def _plan(
    config: Config,
    model: GlobalModel,
    method: Method,
    traffic: _Traffic,
    num_clients: int,
    num_parameters: int,
    memory_bytes: int,
    warnings: Sequence[str],
) -> Plan:
    uplink, downlink = traffic.uplink, traffic.adapter + traffic.residual
    wide = (
        f"the residual makes the downlink up to {downlink / uplink:.1f} times the uplink; an energy "
        "below 1 in [method.settings] bounds it, carrying the rest on"
    )
    return Plan(
        model=config.model.name,
        num_parameters=num_parameters,
        num_trained=model.adapter.num_numbers(),
        num_clients=num_clients,
        num_rounds=config.federation.num_rounds,
        method=repr(method),
        uplink_bytes=uplink,
        downlink_bytes=downlink,
        memory_bytes=memory_bytes,
        disk_bytes=(config.run.keep_rounds + 1) * uplink
        + 2 * _update_bytes(config, traffic)  # the list, and what the kept recipes name
        + traffic.residual
        + traffic.spool,
        warnings=((wide,) if downlink > 3 * uplink else ()) + tuple(warnings),
    )


def _here() -> dict[str, Any]:
    """Versions and threads of this process."""
    return {
        "versions": {"python": platform.python_version(), **{package: installed(package) for package in PACKAGES}},
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "processor": torch.backends.cpu.get_cpu_capability(),
    }


def environment(local: LocalModel) -> dict[str, Any]:
    """What the last bits of a result depend on, and what a reader wants to know."""
    return {
        **_here(),
        "device": str(local.peft.device),
        "dtype": str(local.dtype).removeprefix("torch."),
        "base_sha256": local.identity.sha256,
        "tokenizer_sha256": local.identity.tokenizer_sha256,
    }


def _warn_of_another_environment(now: Mapping[str, Any], out: Path) -> None:
    """Warn where a run is resumed with other versions, threads or the like than it was made with.

    Raises:
        ModelError: If environment.json was damaged.
    """
    file = out / "environment.json"
    try:
        before, _ = read_facts(file, EnvironmentFile)
    except FileNotFoundError:
        LOG.warning("%s is missing: whether this is the run's environment is not known", file)
        return
    except ModelError as error:
        raise ModelError(f"{error}. Restore it from a copy; or delete it, and resume without its check") from error
    changed = [key for key in now if now[key] != before.get(key)]
    if changed:
        LOG.warning(
            "resumed in another environment (%s differ): the rounds from here on may differ in their last bits",
            ", ".join(changed),
        )
