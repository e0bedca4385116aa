"""The round, once for every transport: sample, send, collect, validate, aggregate, evaluate, checkpoint."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import msgspec
import torch
from torch import Tensor

from fedmomentum.adapter import Adapter, from_tensors, to_tensors
from fedmomentum.aggregation import Method
from fedmomentum.aggregation.whole import AdapterAggregate, combine, start_of, with_tails
from fedmomentum.checkpoint import RunFolder, ServerState
from fedmomentum.checks import (
    check_aggregate,
    check_evaluation,
    check_losses,
    check_magnitude,
    check_measurements,
)
from fedmomentum.config import Config, LoraConfig
from fedmomentum.consolidation import Delivery, consolidated, delivery, dense_bytes, is_due, worth_keeping
from fedmomentum.diagnostics import NUM_PROBES, probe, probe_vectors, relative_rms, round_diagnostics
from fedmomentum.errors import FedMomentumError, PayloadError, QuorumError
from fedmomentum.global_model import GlobalModel
from fedmomentum.lowrank import LowRank
from fedmomentum.manifest import Manifest, Recipe, as_manifest
from fedmomentum.messages import (
    BASE_PROBES,
    EFFECTIVE_PROBES,
    SECONDS,
    ClientLora,
    EvaluateRequest,
    EvaluateResult,
    FreshAdapter,
    MissingObjects,
    Reply,
    ScoreSums,
    Task,
    TrainRequest,
    TrainResult,
    decode_reply,
    encode_task,
)
from fedmomentum.schema import printable
from fedmomentum.screening import Screening
from fedmomentum.sums import norm as norm_of
from fedmomentum.sums import rank_of
from fedmomentum.transport import Failure, Transport
from fedmomentum.wire import rounding_error, widened, wire_dtype

LOG = logging.getLogger("fedmomentum")
PROBES = (BASE_PROBES, EFFECTIVE_PROBES)

Observer = Callable[[str, Mapping[str, Any]], None]
"""Told of what happens: `observer(event, facts)`; events are `round`, `aggregate`, `evaluate`, `row`."""


def derive(seed: int, *names: object) -> int:
    """A seed for one purpose: independent of all others, the same everywhere."""
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return int.from_bytes(digest[:4])


def sample_participants(seed: int, server_round: int, client_ids: Sequence[str], participation: float) -> list[str]:
    """Who takes part in a round: `ceil(participation * n)` clients, drawn from (seed, round) alone; sorted."""
    ordered = sorted(client_ids)
    count = max(1, math.ceil(participation * len(ordered) - 1e-9))
    generator = torch.Generator().manual_seed(derive(seed, "participants", server_round))
    return sorted(ordered[i] for i in torch.randperm(len(ordered), generator=generator)[:count].tolist())


def client_weights(num_examples: Mapping[str, int], max_share: float) -> dict[str, float]:
    """`w_i = N_i / sum N`, but none above `max_share`; what is cut off goes to the others in proportion.

    A cap below equal shares cannot be kept, and counts as equal shares.
    """
    cap = max(max_share, 1 / len(num_examples))
    capped: set[str] = set()
    while True:
        rest = sum(count for client, count in num_examples.items() if client not in capped)
        free = 1 - cap * len(capped)
        weights = {c: cap if c in capped else free * n / rest for c, n in sorted(num_examples.items())}
        over = {client for client, weight in weights.items() if weight > cap * (1 + 1e-12)}
        if not over:
            return weights
        capped |= over


@dataclass
class _Exchange:
    """One question to several clients: who was asked, who answered well, who did not and why."""

    replies: dict[str, Reply] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    uplink_bytes: dict[str, int] = field(default_factory=dict)
    downlink_bytes: dict[str, int] = field(default_factory=dict)
    encode_seconds: float = 0.0
    wait_seconds: float = 0.0
    screening: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class _Server:
    """What stays the same over the rounds of one run."""

    transport: Transport
    method: Method
    config: Config
    folder: RunFolder
    observer: Observer


def run_rounds(
    transport: Transport,
    *,
    method: Method,
    model: GlobalModel,
    state: ServerState,
    config: Config,
    folder: RunFolder,
    observer: Observer = lambda event, facts: None,
) -> GlobalModel:
    """Run the rounds that are left, each committed to `folder` before the next begins.

    Args:
        transport: reaches the clients.
        method: combines their adapters.
        model: where to start: `server_round` 0 for a fresh run, which first evaluates the untouched model.
        state: the server's memory, from `RunFolder.resume` or fresh.
        config: the run's settings.
        folder: takes checkpoints and metrics.
        observer: told of progress.

    Returns:
        The global model after the last round.

    Raises:
        QuorumError: too few clients answered well; every round before is saved.
    """
    server = _Server(transport, method, config, folder, observer)
    if not folder.rows:
        model, state = _untouched(server, model, state)
    for server_round in range(model.server_round + 1, config.federation.num_rounds + 1):
        model, state = _round(server, model, state, server_round)
    return model


def _untouched(server: _Server, model: GlobalModel, state: ServerState) -> tuple[GlobalModel, ServerState]:
    """Round 0: nothing is trained; the untouched model is evaluated."""
    server.observer("round", {"round": 0, "participants": []})
    row: dict[str, Any] = {
        "round": 0, "participants": [], "accepted": [], "failures": {}, "weights": {}, "num_examples": {},
        "learning_rate": None, "train_loss": None, "clients": {}, "screening": {}, "evaluation": None,
        "retained_energy": None,
        "residual_rank": None, "residual_norm": None, "carried_norm": None, "exactness_error": None,
        "applied_share": None, "uplink_rounding": None, "downlink_rounding": None, "diagnostics": None,
        "is_best": False, "version": model.version, "uplink_bytes": {}, "downlink_bytes": {},
    }  # fmt: skip
    exchange = _Exchange()
    if server.config.evaluation.every:
        exchange, state = _evaluate(server, model, state, 0, server.transport.clients())
        _add_evaluation(row, exchange, None)
    _tell_failures(0, exchange.failures)
    row["failures"] = dict(sorted(exchange.failures.items()))
    row["uplink_bytes"], row["downlink_bytes"] = _added(exchange.uplink_bytes, {}), _added(exchange.downlink_bytes, {})
    row["seconds"] = {
        "train": 0.0, "encode": exchange.encode_seconds, "aggregate": 0.0, "merge": 0.0,
        "evaluate": exchange.wait_seconds,
    }  # fmt: skip
    return model, _commit(server, model, state, row)


def _round(
    server: _Server, model: GlobalModel, state: ServerState, server_round: int
) -> tuple[GlobalModel, ServerState]:
    """One round."""
    config = server.config
    client_ids = server.transport.clients()
    participants = sample_participants(config.run.seed, server_round, client_ids, config.federation.participation)
    learning_rate = config.training.rate(server_round, config.federation.num_rounds)
    server.observer("round", {"round": server_round, "participants": participants})
    ranks = {client: _own(server, state, client).rank for client in participants}
    consolidating = time.perf_counter()
    model, state = _consolidated(server, model, state, participants)
    consolidating = time.perf_counter() - consolidating
    exchange, updates, state = _train(server, model, state, server_round, participants, learning_rate)

    aggregating = time.perf_counter()
    counts = {client: exchange.replies[client].num_examples for client in sorted(updates)}
    weights = client_weights(counts, config.federation.max_client_share)
    result = combine(
        [updates[client] for client in weights],
        list(weights.values()),
        server.method,
        ranks={module: matrix.rank for module, matrix in model.adapter.modules.items()},
        scalings=model.adapter.scalings,
        reference=model.adapter,
        carried=model.carried,
        server_round=server_round,
        seed=config.run.seed,
        on_module=lambda done, total: server.observer("aggregate", {"done": done, "total": total}),
    )
    check_aggregate(result, server_round)
    weights = dict(zip(weights, result.weights.tolist(), strict=True))
    merging = time.perf_counter()
    later = model.after(result, repr(server.method), exact=server.method.exact)
    last = server_round == config.federation.num_rounds
    evaluates = bool(config.evaluation.every) and (last or server_round % config.evaluation.every == 0)
    asked = (client_ids if last else list(weights)) if evaluates else []
    later, state = _consolidated(server, later, state, asked)
    merged = time.perf_counter()
    diagnostics = round_diagnostics(
        model.adapter, [updates[client] for client in weights], list(weights.values()), later.adapter,
        later.merged_last(), server.folder.last_update(model, state),
    )  # fmt: skip
    state = state.stepped(model, later)
    server.folder.spool.clear()

    row: dict[str, Any] = {
        "round": server_round, "participants": participants, "accepted": list(weights), "weights": weights,
        "num_examples": counts, "learning_rate": learning_rate, **_train_metrics(exchange, weights, ranks),
        "screening": exchange.screening, "evaluation": None, **_energies(result, later), "exactness_error": None,
        "applied_share": None,
        "uplink_rounding": _uplink_rounding(exchange, weights),
        "downlink_rounding": 0.0
        if later.adapter_dtype == torch.float32
        else rounding_error(result.adapter, later.adapter),
        "diagnostics": diagnostics, "is_best": False, "version": later.version,
    }  # fmt: skip
    evaluation = _Exchange()
    if evaluates:
        evaluation, state = _evaluate(server, later, state, server_round, asked)
        seed = _probe_seed(config, server_round)
        # where factors stay with their clients, there is no one model to compare with
        one_model = not server.method.personal
        expected = _expected_probes(exchange, weights, model, later, seed) if one_model else None
        _add_evaluation(row, evaluation, expected)
    _tell_failures(server_round, evaluation.failures)
    failures = dict(exchange.failures)
    for client, reason in evaluation.failures.items():
        before = f"{failures[client]}; " if client in failures else ""
        failures[client] = f"{before}evaluation: {reason}"
    row["failures"] = dict(sorted(failures.items()))
    row["uplink_bytes"] = _added(exchange.uplink_bytes, evaluation.uplink_bytes)
    row["downlink_bytes"] = _added(exchange.downlink_bytes, evaluation.downlink_bytes)
    loading = [sum(_merge_seconds(reply) for reply in e.replies.values()) for e in (exchange, evaluation)]
    row["seconds"] = {
        "train": max(0.0, exchange.wait_seconds - loading[0]),
        "encode": exchange.encode_seconds + evaluation.encode_seconds,
        "aggregate": merging - aggregating,
        "merge": consolidating + merged - merging + sum(loading),
        "evaluate": max(0.0, evaluation.wait_seconds - loading[1]),
    }
    return later, _commit(server, later, state, row)


def _tell_failures(server_round: int, failures: Mapping[str, str]) -> None:
    for client, reason in failures.items():
        LOG.warning("round %d: %s gave no evaluation: %s", server_round, client, reason)


def _train(
    server: _Server,
    model: GlobalModel,
    state: ServerState,
    server_round: int,
    participants: Sequence[str],
    learning_rate: float,
) -> tuple[_Exchange, dict[str, Adapter], ServerState]:
    """Have the participants train; their usable updates, if they are enough.

    Raises:
        QuorumError: they are not.
    """
    federation = server.config.federation
    manifest = _sent_manifest(model)
    requests = {}
    for client in participants:
        lora = _client_lora(server, state, client)
        requests[client] = train_request(server.config, server_round, client, learning_rate, lora, manifest)
    uploads, dtype = server.method.uploads(server_round), wire_dtype(federation.uplink_dtype)
    owns, owned = {client: _own(server, state, client) for client in participants}, server.config.lora.clients
    updates, screening = dict[str, Adapter](), Screening(server.config, server.method, server_round, learning_rate)

    def take(reply: Reply) -> None:
        client = reply.client_id
        update = _update(reply, model, server, owns[client], uploads, dtype)
        start = partial(_start, server, model, client, owns[client])
        screening.add(
            client, update, start, like=repr((owns[client], client in owned)), num_examples=reply.num_examples
        )
        updates[client] = server.folder.spool.put(update)

    exchange, state = _ask(server, model, state, server_round, requests, take)
    exchange.screening = screening.leave_out(updates, exchange.failures)
    for client, reason in exchange.failures.items():
        LOG.warning("round %d: %s is left out: %s", server_round, client, reason)
    needed = max(1, math.ceil(federation.quorum * len(participants) - 1e-9))
    if len(updates) < needed:
        told = "; ".join(f"{client}: {reason}" for client, reason in sorted(exchange.failures.items()))
        raise QuorumError(
            f"round {server_round}: {len(updates)} of {len(participants)} clients gave a usable update and the "
            f"quorum is {needed} ({told}). Rounds up to {server_round - 1} are saved; mend the clients and resume, "
            "or lower federation.quorum"
        )
    if server.method.prunes:
        state = replace(state, ranks={**state.ranks, **{c: _next_rank(exchange.replies[c]) for c in updates}})
    return exchange, updates, state


def train_request(
    config: Config, server_round: int, client: str, learning_rate: float, lora: ClientLora, manifest: Manifest
) -> TrainRequest:
    """What a client is asked to train in a round."""
    training = config.training
    return TrainRequest(
        manifest=manifest,
        lora=lora,
        chat_date=config.model.chat_date,
        learning_rate=learning_rate,
        local_steps=training.local_steps,
        local_epochs=training.local_epochs,
        batch_size=training.batch_size,
        arguments=training.arguments,
        seed=derive(config.run.seed, "batches", server_round, client),
        probe_seed=_probe_seed(config, server_round),
        uplink_dtype=config.federation.uplink_dtype,  # type: ignore[arg-type]
    )


def _sent_manifest(model: GlobalModel) -> Manifest:
    """The manifest as clients are sent it: what is carried is the server's own."""
    return as_manifest({**model.manifest(), "carried": None}, "the model")


def _probe_seed(config: Config, server_round: int) -> int:
    """The round's probes: the same for its training and for the evaluation of what came out of it."""
    return derive(config.run.seed, "probe", server_round)


def _is_probed(model: GlobalModel) -> bool:
    """Whether an evaluation measures weights: not those of an untouched model, with which nothing could be compared."""
    return model.server_round > 0 or bool(model.base_update)


def _commit(server: _Server, model: GlobalModel, state: ServerState, row: dict[str, Any]) -> ServerState:
    """Mark the best round so far, make the round durable, tell of it."""
    loss = row["evaluation"]["compared"]["loss"] if row["evaluation"] and row["round"] else None
    if loss is not None and (state.best_loss is None or loss < state.best_loss):
        row["is_best"] = True
        state = replace(state, best_round=row["round"], best_loss=loss)
    server.folder.commit(model, state, row)
    server.observer("row", row)
    return state


# ── asking ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _size(server: _Server, model: GlobalModel) -> Callable[[str], int]:
    """Hash to bytes, of the model's parts and of what the kept recipes name."""
    sizes = {blob.name: len(blob.data) for blob in model.base_update}
    return lambda name: sizes[name] if name in sizes else server.folder.size(name)


def _deliveries(server: _Server, model: GlobalModel, state: ServerState, clients: Sequence[str]) -> dict[str, Delivery]:
    """What brings each client to the model's base, by what the server believes that it holds."""
    names, size = [blob.name for blob in model.base_update], _size(server, model)
    return {client: delivery(names, state.held.get(client, ()), state.recipes, size) for client in clients}


def _consolidated(
    server: _Server, model: GlobalModel, state: ServerState, asked: Sequence[str]
) -> tuple[GlobalModel, ServerState]:
    """The model with its list made one snapshot, where that is due for those who are asked next.

    It follows from model and state as they are saved, and from who is asked, so it is the same after a kill.
    """
    if not is_due(model, [way.size for way in _deliveries(server, model, state, asked).values()]):
        return model, state
    later, recipe, ties = consolidated(model)
    # what the recipe names is read from the folder, where all is but for what this round made
    server.folder.put({ties.name: ties.data, **{blob.name: blob.data for blob in model.newest}})
    recipes = worth_keeping((*state.recipes, recipe), _size(server, model), dense_bytes(model))
    return later, replace(state, recipes=recipes)


_KEEPS_NOTHING = "client {} says that it lacks what it was just sent; is its disk full or broken?"


def _ask(
    server: _Server,
    model: GlobalModel,
    state: ServerState,
    server_round: int,
    requests: Mapping[str, TrainRequest] | Mapping[str, EvaluateRequest],
    take: Callable[[Reply], None] = lambda reply: None,
) -> tuple[_Exchange, ServerState]:
    """Send each client its task, with the objects it lacks; decode the answers as they come.

    Each is given to `take`, which refuses it by raising; of its tensors only the small ones stay.

    What a client lacks is first the server's belief: what it last said it holds; a snapshot that it can make of that
    it is told to make. A client that has lost some of it since (a new disk, an older copy), or comes to another
    snapshot, says so, and is asked again with what it then lacks.
    """
    exchange = _Exchange()
    deliveries, objects = _deliveries(server, model, state, sorted(requests)), model.objects()
    for name in sorted({name for way in deliveries.values() for name in way.objects} - objects.keys()):
        objects[name] = server.folder.read(name)
    needed = _sent_manifest(model).needed
    limit = 8 * model.adapter.num_numbers() + 16 * NUM_PROBES * len(model.adapter.modules) + 2**20

    def task(client: str, lacking: Collection[str], recipes: Sequence[Recipe] = ()) -> Task:
        request: TrainRequest | EvaluateRequest = requests[client]
        request = msgspec.structs.replace(request, fresh=fresh, recipes=list(recipes))
        return Task(state.run_id, client, server_round, request, {name: objects[name] for name in sorted(lacking)})

    fresh, drawn = None, set[str]()
    if server.method.fresh and model.server_round:  # clients draw the adapter themselves, and say if they cannot
        fresh = FreshAdapter(
            seed=server.config.run.seed,
            server_round=model.server_round,
            dtype=server.config.federation.downlink_dtype,  # type: ignore[arg-type]
        )
        drawn = {model.adapter_objects[kind].name for kind in "BA"}
    adapter = {blob.name for blob in model.adapter_objects.values()} - drawn
    tasks = {
        client: task(client, way.objects | (adapter - {*state.held.get(client, ())}), way.recipes)
        for client, way in deliveries.items()
    }
    held: dict[str, tuple[str, ...]] = {}
    splits: dict[str, str] = {}

    def accept(client: str, reply: Reply) -> None:
        if reply.version != model.version:
            exchange.failures[client] = (
                f"client {client} ended with base version {reply.version[:16]!r}; wanted {model.version[:16]}. It sits "
                "this one out"
            )
            return
        held[client] = tuple(sorted(needed.intersection(reply.holds)))
        splits[client] = reply.split
        with containing(client, exchange.failures):
            take(reply)
        if client in exchange.failures:
            return
        small = {name: tensor.clone() for name, tensor in reply.tensors.items() if name in (*PROBES, SECONDS)}
        exchange.replies[client] = replace(reply, tensors=small)

    again = {}
    for client, reply in _send(server.transport, tasks, exchange, limit):
        if not isinstance(reply.answer, MissingObjects):
            accept(client, reply)
        elif set(reply.answer.missing) <= needed - tasks[client].objects.keys():
            again[client] = task(client, set(reply.answer.missing))
        else:
            exchange.failures[client] = _KEEPS_NOTHING.format(client)
    if again:
        for client, reply in _send(server.transport, again, exchange, limit):
            if isinstance(reply.answer, MissingObjects):
                exchange.failures[client] = _KEEPS_NOTHING.format(client)
            else:
                accept(client, reply)
    for client in sorted(held):
        if state.splits.get(client, splits[client]) != splits[client]:
            LOG.warning(
                "round %d: %s divides its examples otherwise than before (another seed, or other data): it trains on "
                "examples that it held out, and its scores are too good from here on. Start it again with what it had",
                server_round,
                client,
            )
        state = state.holding(client, held[client]).dividing(client, splits[client])
    return exchange, state


@contextmanager
def containing(client: str, failures: dict[str, str]) -> Iterator[None]:
    """Contain what is raised while one client's answer is handled: it ends that client's part, not the server's.

    A disk that is full, or any other trouble of this machine, is no fault of the client's.

    Raises:
        OSError: If this machine could not do its own part.
    """
    try:
        yield
    except FedMomentumError as error:
        failures[client] = printable(str(error))
    except OSError:
        raise
    except Exception as error:
        LOG.debug("the answer of %s could not be handled", client, exc_info=error)
        failures[client] = f"client {client}: its answer could not be handled ({type(error).__name__})"


class _Payloads(Mapping[str, bytes]):
    """Tasks as bytes, each encoded when it is sent: one at a time is in memory."""

    def __init__(self, tasks: Mapping[str, Task]) -> None:
        self._tasks = tasks
        self.sizes: dict[str, int] = {}
        self.seconds = 0.0

    def __getitem__(self, client: str) -> bytes:
        started = time.perf_counter()
        payload = encode_task(self._tasks[client])
        self.sizes[client] = len(payload)
        self.seconds += time.perf_counter() - started
        return payload

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)


def _send(
    transport: Transport, tasks: Mapping[str, Task], exchange: _Exchange, max_bytes: int
) -> Iterator[tuple[str, Reply]]:
    """Send the tasks, and give each answer as it comes; what is none is added to the exchange's failures.

    Raises:
        PayloadError: a task is larger than the transport carries; nothing was sent.
    """
    if not tasks:
        return
    payloads = _Payloads(tasks)
    largest = max(tasks, key=lambda client: sum(map(len, tasks[client].objects.values())))
    if (size := len(payloads[largest])) > transport.max_payload_bytes:
        raise PayloadError(
            f"the task for {largest} has {size} bytes, {sum(map(len, tasks[largest].objects.values()))} of them "
            f"objects it lacks; this transport carries at most {transport.max_payload_bytes}. Lower lora.rank, adapt "
            "fewer modules, set an energy below 1 in [method.settings], or send 16 bits (federation.uplink-dtype, "
            "federation.downlink-dtype)"
        )
    silent, since, encoded = set(tasks), time.perf_counter(), payloads.seconds
    for client, answer in transport.send_and_receive(payloads):
        arrived = time.perf_counter()
        exchange.wait_seconds += arrived - since
        silent.discard(client)
        if isinstance(answer, Failure):
            exchange.failures[client] = answer.reason
        else:
            exchange.uplink_bytes[client] = exchange.uplink_bytes.get(client, 0) + len(answer)
            reply = None
            with containing(client, exchange.failures):
                reply = decode_reply(answer, tasks[client], max_bytes)
            if reply is not None:
                yield client, reply
        since = time.perf_counter()
        exchange.encode_seconds += since - arrived
    exchange.wait_seconds += time.perf_counter() - since - (payloads.seconds - encoded)
    exchange.encode_seconds += payloads.seconds
    for client in silent:
        exchange.failures[client] = "missing: no answer in time"
    for client, size in payloads.sizes.items():
        exchange.downlink_bytes[client] = exchange.downlink_bytes.get(client, 0) + size


def _evaluate(
    server: _Server, model: GlobalModel, state: ServerState, server_round: int, clients: Sequence[str]
) -> tuple[_Exchange, ServerState]:
    """Ask the clients to evaluate the model on their held-out examples."""
    settings = server.config.evaluation
    ends = server_round in (0, server.config.federation.num_rounds)
    num_examples = max(settings.num_examples, settings.final_num_examples) if ends else settings.num_examples
    is_probed = _is_probed(model)
    manifest = _sent_manifest(model)
    requests = {
        client: EvaluateRequest(
            manifest=manifest,
            lora=_client_lora(server, state, client),
            chat_date=server.config.model.chat_date,
            num_examples=num_examples,
            num_compared=settings.num_examples,
            batch_size=settings.batch_size,
            probe_seed=_probe_seed(server.config, server_round) if is_probed else None,
        )
        for client in clients
    }
    server.observer("evaluate", {"clients": list(clients)})
    num_modules = len(model.adapter.modules)

    def take(reply: Reply) -> None:
        check_evaluation(reply, num_examples, num_modules if is_probed else 0)

    return _ask(server, model, state, server_round, requests, take)


# ── checking ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _update(
    reply: Reply, model: GlobalModel, server: _Server, own: LoraConfig, uploads: str, dtype: torch.dtype
) -> Adapter:
    """The update in a reply, if it is what it should be.

    A factor that this round does not ask for is the one that clients were sent, bit for bit.

    Raises:
        FedMomentumError: it is not.
    """
    client, tensors = reply.client_id, dict(reply.tensors)
    name = f"client {client}"
    assert isinstance(reply.answer, TrainResult)  # the answer to a request to train
    check_losses(reply.answer, name)
    check_measurements(tensors, len(model.adapter.modules), name)
    for key in (*PROBES, SECONDS):
        del tensors[key]
    if server.method.prunes:
        _check_next_rank(reply, own.rank)
    start, beside = _start(server, model, client, own)
    shared = [f".lora_{factor}." for factor in "BA" if factor not in uploads]
    known = {name: t for name, t in to_tensors(start).items() if any(kind in name for kind in shared)}
    wide = widened(tensors, dtype, name)
    if more := sorted(wide.keys() & known.keys()):
        raise PayloadError(f"{name}: tensor {more[0]} was not asked for; this round takes {uploads}")
    update = from_tensors(wide | known, like=start, name=name)
    check_magnitude(update)
    return with_tails(update, beside)


def _own(server: _Server, state: ServerState, client: str) -> LoraConfig:
    """What a client trains now: what is configured for it, at the rank to which the method has pruned it."""
    own = server.config.lora.of(client)
    return own.at_rank(state.ranks.get(client, own.rank))


def _is_mixed(server: _Server) -> bool:
    return server.config.lora.is_mixed or server.method.prunes


def _client_lora(server: _Server, state: ServerState, client: str) -> ClientLora:
    return ClientLora.of(_own(server, state, client), _is_mixed(server))


def _next_rank(reply: Reply) -> int:
    """The rank at which a client of a method that prunes continues; checked when the reply was taken."""
    assert isinstance(reply.answer, TrainResult) and reply.answer.next_rank is not None
    return reply.answer.next_rank


def _check_next_rank(reply: Reply, rank: int) -> None:
    """Refuse, for a method that prunes, a client that would continue at no rank, or at a larger one."""
    assert isinstance(reply.answer, TrainResult)
    got = reply.answer.next_rank
    if got is None or got > rank:
        raise PayloadError(
            f"client {reply.client_id}: its next_rank is {got!r}; wanted a whole number from 1 to {rank}, its rank now"
        )


def _start(server: _Server, model: GlobalModel, client: str, own: LoraConfig) -> tuple[Adapter, dict[str, LowRank]]:
    """What a client started from, derived here as it is there; see `start_of`."""
    lora = server.config.lora
    if client not in lora.clients and not _is_mixed(server):
        return model.adapter, {}
    names = own.target_modules if client in lora.clients else []
    mine = [m for m in model.adapter.modules if not names or any(f".{m}".endswith(f".{name}") for name in names)]
    return start_of(server.method, model.adapter, mine, rank=own.rank, scaling=own.scaling, is_mixed=_is_mixed(server))


# ── measuring ────────────────────────────────────────────────────────────────────────────────────────────────────


def _train_metrics(exchange: _Exchange, weights: Mapping[str, float], ranks: Mapping[str, int]) -> dict[str, Any]:
    clients = {}
    for client in weights:
        metrics = msgspec.structs.asdict(_result(exchange, client))
        del metrics["next_rank"]  # it is the next row's rank
        clients[client] = {**dict(sorted(metrics.items())), "rank": ranks[client]}
    return {"train_loss": sum(w * clients[c]["loss"] for c, w in weights.items()), "clients": clients}


def _result(exchange: _Exchange, client: str) -> TrainResult:
    answer = exchange.replies[client].answer
    assert isinstance(answer, TrainResult)
    return answer


def _uplink_rounding(exchange: _Exchange, weights: Mapping[str, float]) -> float:
    """The clients' weighted mean of what 16 bits took from their updates, relative."""
    return sum(w * _result(exchange, client).rounding for client, w in weights.items())


def _energies(result: AdapterAggregate, model: GlobalModel) -> dict[str, Any]:
    """What the method says of the sum, over all modules; None where it says nothing.

    Where it does not say the sum's energy, that is what it kept and what left in this round: orthogonal parts.
    """
    s, told = model.adapter.scalings, {m: f for m, f in result.findings.items() if "kept_energy" in f}
    squares = (
        {m: norm_of(part, torch.float32) ** 2 for m, part in p.items()} for p in (result.residual, result.carried)
    )
    residual, carried = squares
    kept = {m: s[m] ** 2 * f["kept_energy"] for m, f in told.items()}
    energy = sum(
        s[m] ** 2 * f["energy"] if "energy" in f else kept[m] + residual.get(m, 0.0) + carried.get(m, 0.0)
        for m, f in told.items()
    )
    if not energy:
        return dict.fromkeys(("retained_energy", "residual_rank", "residual_norm", "carried_norm"))
    return {
        "retained_energy": sum(kept.values()) / energy,
        "residual_rank": sum(rank_of(part) for part in result.residual.values()) / len(result.findings),
        "residual_norm": math.sqrt(sum(residual.values()) / energy),
        "carried_norm": math.sqrt(sum(carried.values()) / energy),
        **({"fallbacks": sum(f["fallback"] for f in result.findings.values())} if _has(result, "fallback") else {}),
    }


def _merge_seconds(reply: Reply) -> float:
    return float(reply.tensors[SECONDS][0])


def _has(result: AdapterAggregate, finding: str) -> bool:
    return any(finding in findings for findings in result.findings.values())


@dataclass(frozen=True)
class _Expected:
    """What an exact aggregation's effective weights must give under the round's probes, and the size of the change."""

    effective: Tensor
    change: Tensor


def _expected_probes(
    exchange: _Exchange, weights: Mapping[str, float], before: GlobalModel, after: GlobalModel, seed: int
) -> _Expected:
    """The weighted mean of what the clients measured on their own trained weights, less what is carried on."""
    effective = sum(w * exchange.replies[c].tensors[PROBES[1]] for c, w in weights.items())
    base = sum(w * exchange.replies[c].tensors[PROBES[0]] for c, w in weights.items())
    assert isinstance(effective, Tensor) and isinstance(base, Tensor)
    change = effective - base
    for row, module in enumerate(sorted(after.adapter.modules)):
        for model, sign in ((before, 1.0), (after, -1.0)):
            if module in model.carried:
                U, X = probe_vectors(module, after.adapter.modules[module].shape, seed)
                effective[row] += sign * probe(model.carried[module], U, X)
    return _Expected(effective, change)


def _add_evaluation(row: dict[str, Any], exchange: _Exchange, expected: _Expected | None) -> None:
    """Put the clients' scores together, and what their probes say of exactness; in place."""
    by_client, by_category, total, compared = {}, dict[str, dict[str, Any]](), _score([]), _score([])
    errors, shares = [], []
    for client, reply in sorted(exchange.replies.items()):
        result = reply.answer
        assert isinstance(result, EvaluateResult)
        if result.total is not None and result.compared is not None:
            by_client[client] = _score([_sums(result.total)])
            total = _score([total, by_client[client]])
            compared = _score([compared, _sums(result.compared)])
            for name, score in result.by_category.items():
                by_category[name] = _score([by_category.get(name, {}), _sums(score)])
        if result.applied_share is not None:
            shares.append(result.applied_share)
        if expected is not None:
            errors.append(relative_rms({"": reply.tensors[PROBES[1]] - expected.effective}, {"": expected.change}))
    if total["num_examples"]:
        row["evaluation"] = {
            "total": total, "compared": compared, "by_client": by_client,
            "by_category": dict(sorted(by_category.items())),
        }  # fmt: skip
    # Infinite where nothing changed and something came out: JSON has no number for that.
    row["exactness_error"] = max(errors) if errors and math.isfinite(max(errors)) else None
    row["applied_share"] = min(shares) if shares else None


def _sums(score: ScoreSums) -> dict[str, Any]:
    return msgspec.structs.asdict(score)


def _score(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The sum of scores, with its loss, perplexity and exact match."""
    sums: dict[str, Any] = {
        key: sum(part.get(key, 0) for part in parts) for key in ("nll", "num_tokens", "num_examples", "num_exact")
    }
    loss = sums["nll"] / sums["num_tokens"] if sums["num_tokens"] else None
    return {
        **sums,
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)) if loss is not None else None,
        "exact_match": sums["num_exact"] / sums["num_examples"] if sums["num_examples"] else None,
    }


def _added(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {client: one.get(client, 0) + other.get(client, 0) for client in sorted({*one, *other})}
