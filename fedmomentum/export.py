"""What users carry away: a merged model folder, or one plain PEFT adapter on the untouched base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from fedmomentum.adapter import Adapter
from fedmomentum.diagnostics import applied_share
from fedmomentum.errors import AdapterError, ModelError
from fedmomentum.files import write_atomically
from fedmomentum.global_model import Blob, GlobalModel
from fedmomentum.identity import identify
from fedmomentum.lowrank import LowRank, from_svd
from fedmomentum.peft_io import write_adapter


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


def export_adapter(model: GlobalModel, out: Path, *, base_folder: Path | None = None) -> None:
    """Write one plain PEFT adapter that, on the untouched base, is the whole model.

    Args:
        model: what to write.
        out: a new or empty folder.
        base_folder: where to take the tokenizer from; without it the folder holds adapter and card only.

    Raises:
        ModelError: `out` holds something already.
    """
    refuse_full(out)
    write_adapter(one_adapter(model), out)
    if base_folder:
        _copy_tokenizer(base_folder, out)
    _write_card(model, out, "peft", f"PeftModel.from_pretrained(base, {str(out.name)!r})")


def export_merged(model: GlobalModel, out: Path, *, base_folder: Path, dtype: torch.dtype = torch.float32) -> float:
    """Write the whole model as an ordinary transformers folder; returns the applied share.

    Args:
        model: what to write.
        out: a new or empty folder.
        base_folder: the base; its identity is checked.
        dtype: of the weights on disk. In 16 bits a part of the change is rounded away.

    Returns:
        `<W - base, change> / <change, change>` over the adapted modules, both in `dtype`: 1 in float32.

    Raises:
        ModelError: another base, or `out` holds something already.
        AdapterError: a tensor of `modules_to_save` has no place in the model.
    """
    from fedmomentum.base import HeldBase, load_base  # transformers: seconds to import

    refuse_full(out)
    model.base.check(identify(str(base_folder), base_folder))
    live = load_base(base_folder, torch.float32, torch.device("cpu"), num_labels=_num_labels(model.adapter))
    held = HeldBase({module: _submodule(live, module) for module in model.adapter.modules}, base_folder)
    held.apply([*model.base_update, Blob.of({m: model.adapter.effective(m) for m in model.adapter.modules})])
    if model.adapter.saved:
        unexpected = live.load_state_dict(dict(model.adapter.saved), strict=False).unexpected_keys
        if unexpected:
            raise AdapterError(f"{unexpected[0]} of modules_to_save has no place in {type(live).__name__}")
    got, wanted = {}, {}
    for module in held.layers:
        pristine, effective = held.pristine(module), model.effective(module)
        got[module] = (held.weight(module).to(dtype).double() - pristine.to(dtype).double()).flatten()
        wanted[module] = (effective.dense() if isinstance(effective, LowRank) else effective).flatten()
    out.mkdir(parents=True, exist_ok=True)
    live.to(dtype=dtype)  # type: ignore[call-arg]
    live.save_pretrained(out)
    _copy_tokenizer(base_folder, out)
    _write_card(model, out, "transformers", f"{type(live).__name__}.from_pretrained({str(out.name)!r})")
    return applied_share(got, wanted)


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


def _submodule(model: nn.Module, module: str) -> nn.Module:
    try:
        return model.get_submodule(module)
    except AttributeError as error:
        raise ModelError(f"the base model has no module {module}; is it the base of this adapter?") from error


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
