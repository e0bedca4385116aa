"""The versioned object: saved, loaded, consolidated, refused; and small residuals arrive."""

import json
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from fedmomentum import FedMomentum, GlobalModel
from fedmomentum.aggregation.aggregate import AggregationResult, RoundContext, aggregate_updates
from fedmomentum.base_model.hub import resolve_base
from fedmomentum.base_model.identity import BaseIdentity, identify
from fedmomentum.base_model.weights import Float32Weights
from fedmomentum.errors import ModelError, PayloadError
from fedmomentum.global_model.consolidation import consolidate, should_consolidate
from fedmomentum.global_model.export import to_single_adapter
from fedmomentum.global_model.objects import StoredObject, object_file
from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.linalg.matrix import to_dense
from fedmomentum.linalg.probes import applied_fraction, probe, probe_vectors
from fedmomentum.lora.adapter import Adapter
from fedmomentum.utils.records import with_checksum
from fedmomentum.utils.tensors import read_safetensors, safetensors_bytes
from tests.helpers import error, generator, random_matrix
from tests.tiny import tiny_gpt2, tiny_llama

SHAPES = {"model.layers.0.self_attn.q_proj": (32, 32), "model.layers.1.self_attn.v_proj": (16, 32)}


def fresh(seed=0, rank=2) -> Adapter:
    modules = {
        m: random_matrix(*shape, rank, seed=seed + i, dtype=torch.float32)
        for i, (m, shape) in enumerate(SHAPES.items())
    }
    return Adapter(
        modules, dict.fromkeys(SHAPES, 1.5), {}, {"r": rank, "lora_alpha": 3, "peft_type": "LORA"}
    )


def next_round(model: GlobalModel, aggregate: AggregationResult, method: str) -> GlobalModel:
    """The next round's model, as the server keeps it if no client has to catch up."""
    next_model = model.advance(aggregate, method)
    return consolidate(next_model)[0] if should_consolidate(next_model) else next_model


def after_rounds(
    num_rounds: int, *, seed=0, method=None
) -> tuple[GlobalModel, dict[str, torch.Tensor]]:
    """A global model after so many rounds of three random clients, and the exact change of each weight."""
    method = method or FedMomentum()
    model = GlobalModel(BaseIdentity("base", sha256="ab" * 32), fresh(seed))
    merged = {m: torch.zeros(shape, dtype=torch.float64) for m, shape in SHAPES.items()}
    for t in range(num_rounds):
        updates = [fresh(seed + 1000 * t + 10 * i + 7) for i in range(3)]
        wanted = {m: sum(u.effective(m).dense() for u in updates) / 3 for m in SHAPES}
        result = aggregate_updates(
            updates,
            [1, 1, 1],
            method,
            RoundContext(ranks=dict.fromkeys(SHAPES, 2), scalings=dict.fromkeys(SHAPES, 1.5)),
        )
        model = next_round(model, result, repr(method))
        merged = {m: merged[m] + wanted[m] - result.adapter.effective(m).dense() for m in SHAPES}
    exact = {m: merged[m] + model.adapter.effective(m).dense() for m in SHAPES}
    return model, exact


def dense(matrix) -> torch.Tensor:
    return matrix.dense() if isinstance(matrix, LowRank) else matrix


@pytest.mark.parametrize("num_rounds", [1, 3, 40])
def test_the_effective_model_is_exact_also_through_consolidation(num_rounds):
    model, exact = after_rounds(num_rounds)
    for module in SHAPES:
        assert error(dense(model.effective(module)), exact[module]) < 1e-5
    size = sum(len(blob.data) for blob in model.base_update)
    limit = 2 * sum(4 * a * b for a, b in SHAPES.values()) + 4096
    assert size < limit  # bounded, however many rounds
    if num_rounds == 40:
        assert any("dense" in key for key in read_safetensors(model.base_update[0].data, "")[0])


def test_one_adapter_holds_the_full_model():
    for num_rounds in (1, 40):
        model, exact = after_rounds(num_rounds)
        single = to_single_adapter(model)
        assert set(single.scalings.values()) == {1.0}
        for module in SHAPES:
            assert error(single.effective(module).dense(), exact[module]) < 1e-5


def test_save_and_load_keep_every_bit(tmp_path):
    model, _ = after_rounds(3, method=FedMomentum(energy=0.8))
    model.save(tmp_path)
    loaded = GlobalModel.load(tmp_path)
    assert loaded.version == model.version and loaded.adapter_objects == model.adapter_objects
    assert loaded.objects() == model.objects() and loaded.manifest() == model.manifest()
    assert loaded.carried.keys() == model.carried.keys() != set()
    assert not any(file.suffix in (".bin", ".pt", ".pkl") for file in tmp_path.rglob("*"))
    assert not (
        tmp_path / "adapter_config.json"
    ).exists()  # the adapter alone is never written as the result


def test_version_is_over_base_and_bytes_in_order():
    model, _ = after_rounds(2)
    assert model.version != replace(model, base_update=model.base_update[::-1]).version
    assert model.version != replace(model, base=BaseIdentity("base", sha256="cd" * 32)).version
    assert (
        model.version == replace(model, adapter=fresh(99)).version
    )  # the live adapter is no part of the base


def test_foreign_newer_or_damaged_files_are_refused_by_name(tmp_path):
    model, _ = after_rounds(2)
    model.save(tmp_path)
    file = tmp_path / "global_model.json"
    manifest = json.loads(file.read_text())

    def refused(match, **changes):
        file.write_text(json.dumps(with_checksum({**manifest, **changes})))
        with pytest.raises(ModelError, match=match):
            GlobalModel.load(tmp_path)

    refused("format_version 2; this fedmomentum reads 3", format_version=2)
    refused("format_version 4; this fedmomentum reads 3", format_version=4)
    refused("format_version True; this fedmomentum reads 3", format_version=True)
    refused("is not a fedmomentum global model", format="else")
    refused("the manifest states", version="0" * 64)
    refused("scalings", scalings={})
    refused(
        "global_model.json: adapter.A: Expected `str` matching regex",
        adapter={"A": "../../etc/passwd"},
    )
    refused("global_model.json: adapter: Expected `object`", adapter="../../etc/passwd")
    refused("global_model.json: round: Expected `int` >= 0", round=-1)
    refused(
        "global_model.json: scalings.*Expected `float` > 0", scalings=dict.fromkeys(SHAPES, 0.0)
    )
    refused("unknown field `more`", more=1)
    refused("nested deeper", adapter_config=json.loads('{"a":' * 50 + "1" + "}" * 50))
    file.write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        GlobalModel.load(tmp_path)
    file.write_text(json.dumps({**manifest, "scalings": dict.fromkeys(SHAPES, 3.0)}))
    with pytest.raises(
        ModelError, match="global_model.json was damaged or altered since it was written"
    ):
        GlobalModel.load(tmp_path)
    file.write_text(json.dumps(manifest))  # laid out in another way
    assert GlobalModel.load(tmp_path).version == model.version
    blob = object_file(tmp_path, manifest["base_update"][0])
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    with pytest.raises(ModelError, match="does not match its hash"):
        GlobalModel.load(tmp_path)
    blob.write_bytes(content[:-1])
    with pytest.raises(
        ModelError, match=f"has {len(content) - 1} bytes, {len(content)} were written"
    ):
        GlobalModel.load(tmp_path)
    blob.unlink()
    with pytest.raises(ModelError, match="does not hold the object"):
        GlobalModel.load(tmp_path)
    blob.mkdir()
    with pytest.raises(ModelError, match="is no regular file"):
        GlobalModel.load(tmp_path)
    with pytest.raises(ModelError, match="nowhere does not exist"):
        GlobalModel.load(tmp_path / "nowhere")


def test_a_manifest_from_the_wire_is_checked_by_the_same_type():
    model, _ = after_rounds(2)
    objects = model.objects()

    def received(**changes):
        return GlobalModel.from_manifest(
            {**model.manifest(), **changes}, lambda name: StoredObject(objects[name]), "a task"
        )

    assert received().manifest() == model.manifest()
    for changes, match in (
        ({"base": {"name": "base"}}, "a task: base: Object missing required field `revision`"),
        ({"base_update": ["x"]}, r"a task: base_update\[0\]: Expected `str` matching"),
        ({"round": 10**400}, "a task: round"),
        ({"scalings": {"a": float("nan")}}, "a task: scalings"),
        ({"sizes": {}}, "unknown field `sizes`"),
        ({"adapter": {"A": model.manifest()["adapter"]["A"]}}, "missing required field `B`"),
        ({"adapter": dict.fromkeys("AB", model.manifest()["adapter"]["A"])}, "is in two of"),
    ):
        with pytest.raises(ModelError, match=match):
            received(**changes)


def test_objects_whose_tensors_do_not_fit_the_model_are_refused_by_name():
    model, _ = after_rounds(1)
    module = next(iter(SHAPES))
    factor = f"base_model.model.{module}.lora_B.weight"
    B = read_safetensors(model.adapter_objects["B"].data, "")[0]

    def received(kind, tensors):
        """The model with one object in place of its own, and the manifest that names it."""
        blob, manifest = StoredObject(safetensors_bytes(tensors)), model.manifest()
        objects = {**model.objects(), blob.name: blob.data}
        if kind == "base_update":
            manifest["base_update"] = [blob.name]
        else:
            manifest["adapter"] = {**manifest["adapter"], kind: blob.name}
        return GlobalModel.from_manifest(
            manifest, lambda name: StoredObject(objects[name]), "a task"
        )

    nan = torch.full_like(B[factor], float("nan"))
    for kind, tensors, match in (
        ("B", {**B, factor: nan}, f"a task: tensor {factor} holds NaN or Inf"),
        ("B", {**B, factor: B[factor][0]}, "is float32 .2,.; wanted a float32 matrix"),
        ("B", {**B, factor: torch.zeros(32, 5)}, "must be .out, rank. and A .rank, in."),
        ("B", {**B, "stray.weight": nan}, "stray.weight does not belong to an adapter"),
        (
            "B",
            {name: tensor for name, tensor in B.items() if name != factor},
            "without its other factor",
        ),
        (
            "B",
            {name: tensor.double() for name, tensor in B.items()},
            "factors are torch.float64|float64",
        ),
        (
            "base_update",
            {"elsewhere.dense": torch.zeros(2, 2)},
            "changes module elsewhere .2, 2., which is not",
        ),
        ("base_update", {f"{module}.dense": torch.zeros(2, 2)}, r"has another shape \(.32, 32.\)"),
        (
            "base_update",
            {f"{module}.dense": torch.full((32, 32), float("inf"))},
            "holds NaN or Inf",
        ),
        ("base_update", {f"{module}.dense": torch.zeros(32)}, "wanted a float32 matrix"),
    ):
        with pytest.raises(ModelError, match=match):
            received(kind, tensors)


def test_objects_that_are_no_base_update_are_refused():
    with pytest.raises(ModelError, match="no part of a base update"):
        _ = StoredObject(safetensors_bytes({"q.B": torch.zeros(2, 1)})).matrices
    for data in (b"", b"short", b"\xff" * 64, (2**40).to_bytes(8, "little") + b"{}" * 40):
        with pytest.raises(PayloadError):
            _ = StoredObject(data).matrices
    tensors = {"q.B": torch.ones(4, 2), "q.A": torch.ones(2, 3)}
    assert set(StoredObject(safetensors_bytes(tensors)).matrices) == {"q"}
    for change, message in (
        ({"q.A": torch.ones(3, 3)}, "module q: B must be"),
        ({"q.A": torch.ones(2, 3, dtype=torch.float64)}, "tensor q.A is float64"),
        ({"q.B": torch.ones(4)}, r"q.B is float32 \(4,\)"),
        ({"q.B": torch.tensor([[float("nan")] * 2] * 4)}, "q.B holds NaN or Inf"),
        ({"q.dense": torch.ones(4, 3)}, "both in factors and dense"),
        ({"p.dense": torch.full((1, 1), float("inf"))}, "p.dense holds NaN or Inf"),
    ):
        with pytest.raises(ModelError, match=message):
            _ = StoredObject(safetensors_bytes(tensors | change)).matrices


# ── the base ──


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fifty_rounds_of_small_residuals_arrive(tmp_path, make, dtype):
    """Each is 3e-4 of the weight's norm; naive adding in 16 bits, beside it, loses most."""
    base = make(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    module = (
        "model.layers.0.self_attn.q_proj" if make is tiny_llama else "transformer.h.0.attn.c_attn"
    )
    layer = model.get_submodule(module)
    naive = layer.weight.detach().clone()
    held = Float32Weights({module: layer}, base)
    shape = tuple(held.weight(module).shape)
    size = held.pretrained(module).norm()
    blobs, wanted = [], torch.zeros(shape, dtype=torch.float64)
    for t in range(50):
        small = random_matrix(*shape, 4, seed=t)
        small = small.scaled(3e-4 * float(size) / small.norm())
        blobs.append(StoredObject.of({module: small}))
        held.apply(blobs)
        wanted += small.dense()
        naive += (small.dense().T if make is tiny_gpt2 else small.dense()).to(dtype)
    U, X = probe_vectors(module, shape, 0)
    got = probe(held.weight(module).double() - held.pretrained(module), U, X)
    assert applied_fraction({"": got}, {"": probe(wanted, U, X)}) == pytest.approx(1, abs=0.01)
    assert error(held.weight(module).double() - held.pretrained(module).double(), wanted) < 1e-3
    if dtype == torch.bfloat16:
        start = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).get_submodule(module).weight
        lost = (
            (naive.double() - start.double()).T
            if make is tiny_gpt2
            else naive.double() - start.double()
        )
        assert error(lost, wanted) > 0.5
    # step by step gives the bits of all at once, and removing it restores the original weight
    step_by_step = held.weight(module).clone()
    held.apply([])
    assert torch.equal(held.weight(module), held.pretrained(module))
    held.apply(blobs)
    assert torch.equal(held.weight(module), step_by_step)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_merging_makes_no_second_matrix_and_leaves_shared_weights_alone(tmp_path, make):
    """Neither when a part is added nor before; other users of the layer's old weight keep it unchanged."""
    base = make(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    module = (
        "model.layers.0.self_attn.q_proj" if make is tiny_llama else "transformer.h.0.attn.c_attn"
    )
    shared = model.get_submodule(module).weight
    before = shared.detach().clone()
    held = Float32Weights({module: model.get_submodule(module)}, base)
    update = StoredObject.of({module: random_matrix(*held.weight(module).shape, 3, seed=1)})
    _ = update.matrices  # read beforehand: only the adding is watched
    allocated = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                allocated.append((result.untyped_storage().data_ptr(), result.numel()))
            return result

    with Watch():
        held.apply([update])
    own = held.weight(module).untyped_storage().data_ptr()
    assert any(storage == own for storage, _ in allocated)
    assert not [size for storage, size in allocated if storage != own and size >= before.numel()]
    assert torch.equal(shared, before) and not torch.equal(
        held.weight(module), held.pretrained(module)
    )


def test_a_held_layer_computes_in_float32_and_answers_in_the_models_dtype(tmp_path):
    base = tiny_llama(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    ids = torch.randint(4, 100, (2, 9), generator=generator(0))
    before = model(input_ids=ids).logits
    Float32Weights({m: model.get_submodule(m) for m in SHAPES}, base)
    after = model(input_ids=ids).logits
    assert after.dtype == torch.bfloat16
    assert (after - before).abs().max() < 0.05 * before.abs().max()


def test_base_update_for_other_modules_or_shapes_is_refused(tmp_path):
    base = tiny_llama(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    held = Float32Weights({m: model.get_submodule(m) for m in SHAPES}, base)
    with pytest.raises(ModelError, match="not adapted here"):
        held.apply([StoredObject.of({"lm_head": random_matrix(4, 4, 1)})])
    with pytest.raises(ModelError, match="another shape"):
        held.apply([StoredObject.of({next(iter(SHAPES)): random_matrix(4, 4, 1)})])
    with pytest.raises(ModelError, match="is a Embedding"):
        Float32Weights({"model.embed_tokens": model.get_submodule("model.embed_tokens")}, base)


def test_a_base_update_is_applied_completely_or_not_at_all(tmp_path, monkeypatch):
    """Whatever stops it midway, the next base that is applied has the bits of one applied to a fresh model."""
    base = tiny_llama(tmp_path / "base")
    first, second = SHAPES
    parts = [
        StoredObject.of(
            {
                m: random_matrix(*shape, 2, seed=10 * seed + i, dtype=torch.float32)
                for i, (m, shape) in enumerate(SHAPES.items())
            }
        )
        for seed in range(3)
    ]

    def held_base() -> Float32Weights:
        model = AutoModelForCausalLM.from_pretrained(base)
        return Float32Weights({m: model.get_submodule(m) for m in SHAPES}, base)

    def weights(held: Float32Weights) -> list[torch.Tensor]:
        return [held.weight(m).clone() for m in SHAPES]

    undisturbed = held_base()
    undisturbed.apply(parts)
    disturbed = held_base()
    disturbed.apply(parts[:1])

    # A part of another shape behind a good one is found before anything is added.
    before = weights(disturbed)
    wrong = StoredObject.of(
        {first: random_matrix(*SHAPES[first], 2), second: random_matrix(4, 4, 1)}
    )
    with pytest.raises(ModelError, match="another shape"):
        disturbed.apply([parts[0], parts[1], wrong])
    assert all(map(torch.equal, before, weights(disturbed)))

    # Memory runs out, or someone presses Ctrl-C, after the first module.
    for error_type in (RuntimeError, KeyboardInterrupt):
        original, calls = Float32Weights.weight, []

        def failing(self, module, error_type=error_type, original=original, calls=calls):
            calls.append(module)
            if len(calls) > len(SHAPES) * len(parts) + 1:  # the checks look at every weight, too
                raise error_type("stopped")
            return original(self, module)

        with monkeypatch.context() as patch:
            patch.setattr(Float32Weights, "weight", failing)
            with pytest.raises(error_type, match="stopped"):
                disturbed.apply(parts)
        assert not all(map(torch.equal, before, weights(disturbed)))  # it did stop midway
        disturbed.apply(parts)
        assert all(map(torch.equal, weights(undisturbed), weights(disturbed)))
        disturbed.apply(parts[:1])
        assert all(map(torch.equal, before, weights(disturbed)))


def test_identity_is_over_content_not_over_names_or_files(tmp_path):
    one = identify("a", tiny_llama(tmp_path / "one"))
    same = identify("b", tiny_llama(tmp_path / "two"))
    other = identify("a", tiny_llama(tmp_path / "three", seed=1))
    assert one.sha256 == same.sha256 != other.sha256
    assert one.tokenizer_sha256 == same.tokenizer_sha256
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert identify("a", tmp_path / "sharded").sha256 == one.sha256
    half = tmp_path / "half"
    model.to(torch.bfloat16).save_pretrained(half)
    assert identify("a", half).sha256 != one.sha256  # the stored dtype counts
    with pytest.raises(ModelError, match="base model differs"):
        one.check(other)


def test_identity_counts_tied_tensors_once(tmp_path):
    from safetensors.torch import load_file, save_file

    base = tiny_gpt2(tmp_path / "base")
    one = identify("a", base)
    tensors = load_file(base / "model.safetensors")
    embedding = next(key for key in tensors if key.endswith("wte.weight"))
    both = tmp_path / "both"
    both.mkdir()
    (both / "config.json").write_bytes((base / "config.json").read_bytes())
    save_file({**tensors, "lm_head.weight": tensors[embedding].clone()}, both / "model.safetensors")
    assert identify("a", both).sha256 == one.sha256


def test_missing_bases_are_refused_by_name(tmp_path):
    with pytest.raises(ModelError, match="no directory ./nowhere"):
        resolve_base("./nowhere")
    with pytest.raises(ModelError, match="nobody/nothing.*give the path"):
        resolve_base("nobody/nothing")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match="pickled"):
        identify("a", tmp_path)


def test_a_hub_name_is_found_in_the_hubs_own_cache(tmp_path, monkeypatch):
    """The layout that huggingface_hub keeps: no network is needed for a model that was downloaded before."""
    import huggingface_hub.constants

    repo = tmp_path / "models--lab--tiny"
    base = tiny_llama(repo / "snapshots" / ("0" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    assert resolve_base("lab/tiny").resolve() == base.resolve()


# ── many rounds ──


def numbers(blobs) -> int:
    return sum(
        tensor.numel()
        for blob in blobs
        for tensor in read_safetensors(blob.data, "blob")[0].values()
    )


@pytest.mark.parametrize("rank, most", [(1, 2), (3, 2), (9, 1)])
def test_the_list_is_bounded_over_two_hundred_rounds_with_any_participation(rank, most):
    """At two dense sizes, and at one beside the last snapshot; and nothing is lost.

    Where a round's residual is as large as a dense matrix, the list is one snapshot, always.
    """
    shape = (20, 24)
    dense = shape[0] * shape[1]
    start = Adapter({"m": random_matrix(*shape, 2).to(torch.float32)}, {"m": 1.0})
    model, wanted = (
        GlobalModel(BaseIdentity("tiny"), start),
        torch.zeros(shape, dtype=torch.float64),
    )
    history, largest = [], 0
    for server_round in range(1, 201):
        residual = random_matrix(*shape, rank, seed=server_round).scaled(1e-3).to(torch.float32)
        if rank == 9:
            residual = residual.dense()
        given = AggregationResult(start, {"m": residual}, {}, {}, torch.ones(1))
        model = next_round(model, given, "method")
        wanted += to_dense(residual).double()
        history.append(model.base_update)
        largest = max(largest, numbers(model.base_update))
        snapshot = [
            blob for blob in model.base_update if "m.dense" in read_safetensors(blob.data, "")[0]
        ]
        assert len(snapshot) <= 1 and snapshot == list(model.base_update[: len(snapshot)])
        for held in history[::7]:
            names = {blob.name for blob in held}
            lacks = numbers(blob for blob in model.base_update if blob.name not in names)
            assert (
                lacks
                <= (1 if all(blob.name in names for blob in snapshot) and snapshot else most)
                * dense
            )
    assert error(to_dense(model.merged("m")), wanted) < 1e-6
    assert (
        largest <= most * dense and len(model.base_update) <= 2 * dense // (rank * sum(shape)) + 1
    )
