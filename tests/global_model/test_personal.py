"""Methods that leave factors with each client: whose they are, that they are restored to the bit, and what is refused."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from fedmomentum.errors import ModelError
from fedmomentum.global_model.personal import PersonalFactors, personal_states
from fedmomentum.protocol.transport import InProcessTransport
from fedmomentum.run.client_setup import prepare_client
from fedmomentum.run.networked import run_federation
from fedmomentum.utils.names import directory_name
from fedmomentum.utils.tensors import read_safetensors, safetensors_bytes
from tests.runs import chain, nudge, objects, prepare, start, timeless, tiny_config

NAMES = ("north", "north-2", "North", "a/b", "..", "*", "[x]", "東京")
"""Names of which a pattern, a path or a file system that ignores case would take one for another."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def odd_config(folder, *, names=NAMES, num_rounds=4, **sections):
    """A FedSA-LoRA run of clients with odd names, each with a different amount of data."""
    federation = {"num_rounds": num_rounds, **sections.pop("federation", {})}
    config = tiny_config(
        folder,
        num_clients=3,
        method={"name": "fedsalora"},
        federation=federation,
        evaluation={"every": 1},
        **sections,
    )
    rows = [
        json.dumps({"question": f"{i} ab", "answer": ("cd", "ef")[i % 2], "kind": "ab"})
        for i in range(60)
    ]
    files = {}
    for number, name in enumerate(names):
        file = folder / f"odd{number}.jsonl"
        file.write_text("\n".join(rows[: 8 + 4 * number]) + "\n")
        files[name] = str(file)
    return replace(config, data=replace(config.data, client_files=files))


def factors_of(model):
    return [p.detach().clone() for n, p in sorted(model.named_parameters()) if "lora_B" in n]


class Watch:
    """A training function that notes the B with which each client begins and ends; data sizes tell them apart."""

    def __init__(self):
        self.at_start, self.at_end = {}, {}

    def __call__(self, model, examples, **settings):
        self.at_start.setdefault(len(examples), []).append(factors_of(model))
        report = nudge(model, examples, **settings)
        self.at_end.setdefault(len(examples), []).append(factors_of(model))
        return report


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def personal_bytes(store):
    return {
        str(f.relative_to(store).parent.name) + f.name: f.read_bytes()
        for f in store.glob("personal/*/*/*")
    }


def test_every_client_continues_with_its_own_factors_whatever_its_name(folder, tmp_path):
    watch = Watch()
    run = start(odd_config(folder), tmp_path / "run", function=watch)
    assert len(watch.at_start) == len(NAMES)
    for size, starts in watch.at_start.items():
        assert len(starts) == 4 and not any(bool(b.any()) for b in starts[0])
        for server_round in range(1, 4):
            assert equal(starts[server_round], watch.at_end[size][server_round - 1])
    run_id = run.state.run_id
    assert personal_states(tmp_path / "run", run_id).clients().keys() == set(NAMES)
    everything = {path for path in tmp_path.rglob("*.safetensors") if "personal" in path.parts}
    assert len(everything) == sum(
        len(personal_states(tmp_path / "run", run_id).files(name)) for name in NAMES
    )
    assert not (tmp_path / "a").exists() and not (tmp_path.parent / "a").exists()


def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(folder, tmp_path):
    config = odd_config(folder, names=NAMES[:4], federation={"client-fraction": 0.5})
    start(config, tmp_path / "whole")

    def stop(event, facts):
        if event == "aggregate" and facts["done"] == 1 and len(timeless(tmp_path / "run")) == 3:
            raise KeyboardInterrupt  # in round 3, after its clients have trained

    with pytest.raises(KeyboardInterrupt):
        start(config, tmp_path / "run", observer=stop)
    resumed = start(config, tmp_path / "run", resume=True)
    assert timeless(tmp_path / "run") == timeless(tmp_path / "whole")
    assert chain(tmp_path / "run") == chain(tmp_path / "whole") and objects(
        tmp_path / "run"
    ) == objects(tmp_path / "whole")
    for name in NAMES[:4]:
        files = personal_states(tmp_path / "run", resumed.state.run_id).files(name)
        assert files
        for server_round in files:
            resumed_state = personal_states(tmp_path / "run", resumed.state.run_id).load(
                name, server_round
            )
            (other,) = (tmp_path / "whole" / "personal").iterdir()
            expected, _ = read_safetensors(
                (other / directory_name(name) / f"{server_round:04d}.safetensors").read_bytes(),
                "other",
            )
            assert resumed_state.tensors.keys() == expected.keys() and all(
                torch.equal(resumed_state.tensors[k], expected[k]) for k in expected
            )


def networked(config, stores):
    steps = {}
    for name in config.data.client_files:
        client = prepare_client(config, name, stores / directory_name(name))
        client.training_function = nudge
        steps[name] = client.handle
    return InProcessTransport(steps)


def test_clients_with_separate_stores_give_the_same_result(folder, tmp_path):
    config = odd_config(folder, names=NAMES[:4])
    run_federation(networked(config, tmp_path / "nodes"), config, tmp_path / "served")
    start(config, tmp_path / "run")
    assert [r["evaluation"] for r in timeless(tmp_path / "served")] == [
        r["evaluation"] for r in timeless(tmp_path / "run")
    ]
    assert objects(tmp_path / "served") == objects(tmp_path / "run")
    assert not (tmp_path / "served" / "personal").exists()
    for name in NAMES[:4]:
        (kept,) = (tmp_path / "nodes" / directory_name(name) / "personal").iterdir()
        # as many checkpoints as the run keeps, and the round before them, for a round that is run
        # again
        assert [file.name for file in sorted((kept / directory_name(name)).iterdir())] == [
            f"{r:04d}.safetensors" for r in (2, 3, 4)
        ]


def test_a_store_that_serves_two_runs_keeps_their_factors_apart(folder, tmp_path):
    """The second run draws its clients; one that first trains late must not find what the first run left."""
    config = odd_config(folder, names=NAMES[:3], num_rounds=3)
    run_federation(networked(config, tmp_path / "nodes"), config, tmp_path / "first")
    second_config = replace(config, federation=replace(config.federation, client_fraction=0.3))
    run_federation(networked(second_config, tmp_path / "nodes"), second_config, tmp_path / "second")
    run_federation(networked(second_config, tmp_path / "fresh"), second_config, tmp_path / "alone")
    assert len({tuple(row["accepted"]) for row in timeless(tmp_path / "alone")[1:]}) > 1
    assert timeless(tmp_path / "second") == timeless(tmp_path / "alone")
    assert objects(tmp_path / "second") == objects(tmp_path / "alone")


def test_what_kept_checkpoints_need_is_kept(folder, tmp_path):
    config = odd_config(folder, names=NAMES[:4], num_rounds=6, federation={"client-fraction": 0.5})
    run = start(config, tmp_path / "run")
    rounds = sorted(int(file.stem) for file in (tmp_path / "run" / "rounds").glob("*.json"))
    accepted = [row["accepted"] for row in timeless(tmp_path / "run")]
    for name in NAMES[:4]:
        kept = personal_states(tmp_path / "run", run.state.run_id).files(name)
        needed = {
            max((t for t in range(1, r + 1) if name in accepted[t]), default=None) for r in rounds
        } - {None}
        assert set(kept) == needed


# ── damaged ──


def damage(file, how):
    data = file.read_bytes()
    if how == "flipped bit":
        file.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    elif how == "cut":
        file.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "no metadata":
        file.write_bytes(safetensors_bytes(read_safetensors(data, "")[0]))
    elif how == "nonsense":
        file.write_bytes(b"x" * len(data))
    else:
        file.unlink()


@pytest.mark.parametrize(
    "how", ["flipped bit", "cut", "empty", "no metadata", "nonsense", "missing"]
)
def test_a_damaged_file_is_refused_by_name_before_a_run_resumes(folder, tmp_path, how):
    config = odd_config(folder, names=NAMES[:2], num_rounds=2)
    run = start(config, tmp_path / "run")
    damage(personal_states(tmp_path / "run", run.state.run_id).files("north-2")[2], how)
    longer = replace(config, federation=replace(config.federation, num_rounds=3))
    message = (
        r"client north-2: .* after round 2 are missing"
        if how == "missing"
        else "own factors are damaged: .*north-2"
    )
    with pytest.raises(ModelError, match=message):
        prepare(longer, tmp_path / "run", resume=True)


def test_a_file_of_another_client_is_refused(folder, tmp_path):
    config = odd_config(folder, names=NAMES[:2], num_rounds=2)
    run = start(config, tmp_path / "run")
    files = {
        name: personal_states(tmp_path / "run", run.state.run_id).files(name)[2]
        for name in NAMES[:2]
    }
    shutil.copy(files["north-2"], files["north"])
    with pytest.raises(
        ModelError, match="client north: .* holds the own factors of north-2 after round 2"
    ):
        personal_states(tmp_path / "run", run.state.run_id).load("north", 2)


def some_factors(**changes):
    tensors = {"a.B": torch.ones(3, 2), "b.B": torch.ones(4, 2)}
    return replace(PersonalFactors("north", "r", 3, 2, 1.5, False, tensors), **changes)


def test_factors_are_written_and_read_completely(tmp_path):
    personal_states(tmp_path, "r").save(some_factors())
    for last_round in (3, 9):
        read = personal_states(tmp_path, "r").load("north", last_round)
        assert (read.client, read.server_round, read.rank, read.scaling, read.mixed) == (
            "north",
            3,
            2,
            1.5,
            False,
        )
        assert torch.equal(read.tensors["b.B"], torch.ones(4, 2)) and len(read.tensors) == 2
    assert (
        personal_states(tmp_path, "r").load("north", 2) is None
        and personal_states(tmp_path, "s").load("north", 3) is None
    )


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        (some_factors(tensors={"a.B": torch.ones(3, 2)}), "b.B is in one of them only"),
        (
            some_factors(tensors={"a.B": torch.ones(3, 2), "b.B": torch.ones(4, 3)}),
            r"b.B is \(4, 3\)",
        ),
        (
            some_factors(tensors={"a.B": torch.ones(3, 2), "b.B": torch.ones(4, 2).double()}),
            "torch.float64; wanted",
        ),
        (
            some_factors(tensors={"a.B": torch.ones(3, 2), "b.B": torch.full((4, 2), torch.nan)}),
            "holds NaN or Inf",
        ),
        (some_factors(rank=4), "have rank 4 and scaling 1.5; the adapter now has rank 2"),
        (some_factors(scaling=2.0), "scaling 2; the adapter"),
    ],
)
def test_factors_that_do_not_fit_change_nothing(factors, message):
    live = {"a.B": torch.zeros(3, 2), "b.B": torch.zeros(4, 2)}
    with pytest.raises(ModelError, match=f"client north: its own factors after round 3.*{message}"):
        factors.copy_into(live, rank=2, scaling=1.5)
    assert not any(bool(tensor.any()) for tensor in live.values())
    some_factors().copy_into(live, rank=2, scaling=1.5)
    assert all(bool((tensor == 1).all()) for tensor in live.values())
