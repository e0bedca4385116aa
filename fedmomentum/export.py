"""What users carry away: a merged model directory, or one plain PEFT adapter on the untouched base.

Both are read back before they count as written: loaded from their directory by stock transformers and PEFT, on the
CPU in float32, and their answers to a few tokens compared with those of the run's model.
"""

from __future__ import annotations

import gc
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedmomentum.adapter import Adapter, to_tensors
from fedmomentum.diagnostics import applied_share
from fedmomentum.errors import AdapterError, ModelError
from fedmomentum.files import write_atomically
from fedmomentum.global_model import GlobalModel
from fedmomentum.identity import identify
from fedmomentum.lowrank import LowRank, from_svd
from fedmomentum.peft_io import read_adapter, write_adapter

CPU = torch.device("cpu")


def one_adapter(model: GlobalModel) -> Adapter:
    """The whole model as one LoRA: per module the least rank that holds `base_update + s B A`, scaling 1."""
    modules = {}
    for module in model.adapter.modules:
        total = model.effective(module)
        if isinstance(total, LowRank):
            whole = total.recompress()
        else:
            U, S, Vh = torch.linalg.svd(total, full_matrices=False)
            whole = from_svd(U, S, Vh, total.dtype)
        if whole.rank == 0:  # PEFT knows no rank 0
            whole = LowRank(whole.B.new_zeros(whole.shape[0], 1), whole.A.new_zeros(1, whole.shape[1]))
        modules[module] = whole.to(torch.float32)
    config = {**model.adapter.config, "base_model_name_or_path": model.base.name}
    return replace(model.adapter, modules=modules, scalings=dict.fromkeys(modules, 1.0), config=config)


# ── an adapter ───────────────────────────────────────────────────────────────────────────────────────────────────


def export_adapter(model: GlobalModel, out: Path, *, base_folder: Path | None = None) -> float | None:
    """Write one plain PEFT adapter that, on the untouched base, is the whole model; read back by stock PEFT.

    Args:
        model: What to write.
        out: A new or empty directory.
        base_folder: The base, which gives the tokenizer, and on which the adapter is read back. Without it, only the
            written tensors are.

    Returns:
        How far the logits of the adapter as read back are from the run's, as a fraction of their norm; None without
        a base.

    Raises:
        ModelError: If `out` holds something already, the base is another one, or what was written is another model.
        AdapterError: If the adapter does not fit the base.
    """
    from fedmomentum.readback import written_aside

    refuse_full(out)
    if base_folder:
        model.base.check(identify(str(base_folder), base_folder))
    wanted = _wanted_logits(model, base_folder) if base_folder else None
    with written_aside(out) as aside:
        whole = one_adapter(model)
        write_adapter(whole, aside)
        _check_written(whole, aside)
        if base_folder:
            _copy_tokenizer(base_folder, aside)
        _write_card(model, aside, "peft", f"PeftModel.from_pretrained(base, {str(out.name)!r})")
        if base_folder is None or wanted is None:
            return None
        return _read_back_adapter(model, whole, aside, base_folder, *wanted)


def _wanted_logits(model: GlobalModel, base_folder: Path) -> tuple[Tensor, Tensor]:
    """A few tokens, and what the run's model answers: the base with what was merged, PEFT's layers around it."""
    from fedmomentum.base import load_base, tied_names

    adapter = model.adapter
    base = load_base(base_folder, torch.float32, CPU, num_labels=_num_labels(adapter), supplied=adapter.saved.keys())
    tokens, logits, _ = _answer_as_trained(model, base, base_folder, tied_names(base))
    del base
    gc.collect()
    return tokens, logits


def _answer_as_trained(
    model: GlobalModel, base: Any, base_folder: Path, tied: Mapping[str, Collection[str]]
) -> tuple[Tensor, Tensor, Any]:
    """A few tokens, what the run's model answers to them, and the base as it was.

    The model is put together as it is in training: nothing here is shared with how it is exported.
    """
    from fedmomentum.base import HeldBase
    from fedmomentum.peft_live import detach, lora_layers, wrap
    from fedmomentum.readback import logits_of, probe_tokens

    trained = wrap(base, model.adapter)
    layers = {module: layer.base_layer for module, layer in lora_layers(trained).items()}
    held = HeldBase(layers, base_folder, tied)
    held.apply(model.base_update)
    tokens = probe_tokens(base)
    logits = logits_of(trained, tokens)
    held.apply([])
    return tokens, logits, detach(trained)


def _check_written(adapter: Adapter, folder: Path) -> None:
    """Refuse an adapter's directory that does not hold the very tensors and scalings that were meant."""
    again = read_adapter(folder)
    wanted, got = to_tensors(adapter), to_tensors(again)
    same = wanted.keys() == got.keys() and all(torch.equal(wanted[name], got[name]) for name in wanted)
    if not same or any(abs(again.scalings[m] - s) > 1e-12 for m, s in adapter.scalings.items()):
        raise ModelError(f"the adapter written to {folder} reads back as another one; the disk is damaged")


def _read_back_adapter(
    model: GlobalModel, whole: Adapter, folder: Path, base_folder: Path, tokens: Tensor, wanted: Tensor
) -> float:
    from fedmomentum.base import load_base
    from fedmomentum.peft_live import read_back, resize_for
    from fedmomentum.readback import check_logits, logits_of

    labels = _num_labels(model.adapter)
    base = load_base(base_folder, torch.float32, CPU, num_labels=labels, supplied=whole.saved.keys())
    resize_for(base, whole)
    got = logits_of(read_back(base, folder), tokens)
    return check_logits(got, wanted, torch.float32, "the adapter, read back by PEFT, is another model")


# ── a merged model ───────────────────────────────────────────────────────────────────────────────────────────────


def export_merged(model: GlobalModel, out: Path, *, base_folder: Path, dtype: torch.dtype = torch.float32) -> float:
    """Write the whole model as an ordinary transformers directory, and read it back.

    Args:
        model: What to write.
        out: A new or empty directory.
        base_folder: The base; its identity is checked.
        dtype: Of the weights on disk. In 16 bits a part of the change is rounded away.

    Returns:
        The share of the change that arrived: `<W - base, change> / <change, change>` over adapted modules and fully
        trained ones, in `dtype`: 1 in float32.

    Raises:
        ModelError: If the base is another one, `out` holds something already, or what was written is another model.
        AdapterError: If a tensor of `modules_to_save` has no place in the model.
    """
    from fedmomentum.base import load_base, tied_names  # transformers: seconds to import
    from fedmomentum.readback import check_logits, logits_of, written_aside
    from fedmomentum.tuned import TunedModel, write_down_ties

    refuse_full(out)
    model.base.check(identify(str(base_folder), base_folder))
    labels, supplied = _num_labels(model.adapter), model.adapter.saved.keys()
    base = load_base(base_folder, torch.float32, CPU, num_labels=labels, supplied=supplied)
    tied = tied_names(base)
    tokens, wanted, live = _answer_as_trained(model, base, base_folder, tied)
    tuned = TunedModel(live, base_folder, model, tied)
    tuned.apply()
    check_logits(logits_of(live, tokens), wanted, torch.float32, "the merged model is another model than the run's")
    share = _arrived(model, tuned, dtype)
    with written_aside(out) as aside:
        write_down_ties(live)
        _round_to(live, dtype)
        with_rounding = logits_of(live, tokens)
        _save(live, base_folder, aside, dtype)
        name = type(live).__name__
        del base, live, tuned  # one model at a time
        gc.collect()
        again = load_base(aside, torch.float32, CPU, num_labels=labels)
        got = logits_of(again, tokens)
        check_logits(got, with_rounding, torch.float32, "the merged model, read back, is not what was written")
        check_logits(got, wanted, dtype, f"the merged model, read back from {dtype}, is another model")
        _copy_tokenizer(base_folder, aside)
        _write_card(model, aside, "transformers", f"{name}.from_pretrained({str(out.name)!r})")
    return share


def _arrived(model: GlobalModel, tuned: Any, dtype: torch.dtype) -> float:
    """The share of the change that is left when the weights are rounded to `dtype`."""
    got, wanted = {}, {}
    for module in tuned.held.layers:
        pristine, effective = tuned.held.pristine(module), model.effective(module)
        got[module] = (tuned.held.weight(module).to(dtype).double() - pristine.to(dtype).double()).flatten()
        wanted[module] = (effective.dense() if isinstance(effective, LowRank) else effective).flatten()
    for name, (before, after) in zip(sorted(model.adapter.saved), tuned.saved, strict=True):
        if not after.is_floating_point():
            continue
        start = torch.zeros_like(after)  # added tokens have no rows before
        rows = tuple(slice(0, size) for size in before.shape)
        start[rows] = before
        got[name] = (after.to(dtype).double() - start.to(dtype).double()).flatten()
        wanted[name] = (after.double() - start.double()).flatten()
    return applied_share(got, wanted)


def _stored(live: Any) -> list[tuple[str, Tensor]]:
    """The floating-point tensors that are written to disk, each once: not the buffers that the model makes anew."""
    persistent = live.state_dict().keys()
    tensors = [*live.named_parameters(), *live.named_buffers()]
    return [(name, tensor) for name, tensor in tensors if name in persistent and tensor.is_floating_point()]


def _round_to(live: Any, dtype: torch.dtype) -> None:
    """Round every weight to what it will be on disk, but for those that transformers keeps in float32."""
    if dtype == torch.float32:
        return
    kept = [*(live._keep_in_fp32_modules or ()), *(live._keep_in_fp32_modules_strict or ())]
    for name, tensor in _stored(live):
        if not any(re.search(rf"(^|\.){re.escape(part)}(\.|$)", name) for part in kept):
            tensor.data = tensor.data.to(dtype).to(torch.float32)


def _save(live: Any, base_folder: Path, out: Path, dtype: torch.dtype) -> None:
    """Write the rounded model in `dtype`, with the base's own generation settings."""
    if getattr(live.config, "auto_map", None) is not None:
        del live.config.auto_map  # code that the base's directory has, and this one has not
    for _, tensor in _stored(live):
        narrow = tensor.data.to(dtype)
        if torch.equal(narrow.to(tensor.dtype), tensor.data):  # all but what is kept in float32
            tensor.data = narrow
    settings = base_folder / "generation_config.json"
    has_settings = live.can_generate() and settings.is_file()
    if has_settings:
        live.generation_config = type(live.generation_config)()  # some bases' own settings cannot be written
    live.save_pretrained(out)
    if has_settings:
        shutil.copyfile(settings, out / settings.name)


def _num_labels(adapter: Adapter) -> int | None:
    """The size of a classification head among the saved tensors; None for a language model."""
    if adapter.config.get("task_type") != "SEQ_CLS":
        return None
    heads = [
        t for n, t in adapter.saved.items() if n.endswith(("score.weight", "classifier.weight", "out_proj.weight"))
    ]
    if not heads:
        raise AdapterError("the adapter is of a sequence classifier but saves no classification head")
    return heads[-1].shape[0]


def refuse_full(out: Path) -> None:
    """Refuse to write over what is there.

    Raises:
        ModelError: `out` is a file, or a folder that is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f"{out} exists and is not empty; nothing was written. Give another --out")


def _copy_tokenizer(base_folder: Path, out: Path) -> None:
    from fedmomentum.base import load_tokenizer

    load_tokenizer(base_folder).save_pretrained(out)


def _write_card(model: GlobalModel, out: Path, library: str, load: str) -> None:
    base = model.base
    kind = "LoRA adapter" if library == "peft" else "merged model"
    write_atomically(
        out / "README.md",
        f"""---
library_name: {library}
base_model: {base.name}
tags: [fedmomentum, federated-learning, lora]
---

# Federated {kind} of {base.name}

Made with fedmomentum: several parties fine-tuned one model with LoRA on data that stayed with them.

| | |
|---|---|
| method | `{model.method}` |
| rounds | {model.server_round} |
| base model | {base.name}{f" (revision {base.revision})" if base.revision else ""} |
| base SHA-256 | `{base.sha256 or "unknown: combined without the base at hand"}` |
| tokenizer SHA-256 | `{base.tokenizer_sha256 or "unknown"}` |
| base version after all merges | `{model.version}` |
| adapted modules | {len(model.adapter.modules)} |

This folder is the whole result{" on the untouched base" if library == "peft" else ""}: `{load}`.
""".encode(),
    )
