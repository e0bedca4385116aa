"""SmolLM2-135M of which only the last layers are adapted, so that a training step takes little.

The outputs of the frozen layers below do not change during a run. They are computed once for every
example of the data, kept beside the weights, and looked up by the example's token ids. Any other
row of tokens goes through all layers, so the model is SmolLM2-135M for every input; what is kept
saves time and nothing else. The vocabulary is cut to the tokens of the data.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from plain_training import train_plainly  # in the directory above
from rich.console import Console
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from fedmomentum.aggregation.moments import Moments
from fedmomentum.data import TokenizedExamples
from fedmomentum.objectives.collation import IGNORED, next_token_pairs, pad_left
from fedmomentum.objectives.objective import CAUSAL_LM
from fedmomentum.training import TrainReport
from fedmomentum.training.function import OnStep, Penalty
from fedmomentum.utils.modules import inner_model

ROWS_PER_BATCH = 32
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class CachedConfig(LlamaConfig):
    """Llama's configuration, the number of layers below the adapted ones, and the kept outputs."""

    model_type = "cached-smollm2"

    def __init__(self, num_cached_layers: int = 0, cache: str = "", **more: Any) -> None:
        self.num_cached_layers = num_cached_layers
        self.cache = cache
        super().__init__(**more)


class CachedForCausalLM(LlamaForCausalLM):
    """Llama that looks up the outputs of its lower layers where it can."""

    config_class = CachedConfig

    def __init__(self, config: CachedConfig) -> None:
        super().__init__(config)
        # Of short rows, the fused kernel's backward pass takes a quarter of a training step.
        self.config._attn_implementation = "eager"
        self._index: dict[bytes, tuple[int, int]] = {}
        self._states = torch.empty(0)
        if config.cache and Path(config.cache).is_file():
            self._read_cache(Path(config.cache))

    def _read_cache(self, file: Path) -> None:
        with safe_open(file, framework="pt") as tensors:
            self._states = tensors.get_tensor("states")
            token_ids = tensors.get_tensor("token_ids")
            starts = tensors.get_tensor("starts").tolist()
        for start, end in zip(starts[:-1], starts[1:], strict=True):
            self._index[_key(token_ids[start:end])] = (start, end)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Predict the next tokens; rows are padded on the left."""
        hidden = self.last_hidden(input_ids, attention_mask, position_ids)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutputWithPast(logits=self.lm_head(hidden[:, kept, :]))

    def last_hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Return what the head projects to the vocabulary: `(batch, length, hidden)`."""
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        hidden = self._looked_up(input_ids, attention_mask)
        first = self.config.num_cached_layers
        if hidden is None:
            first = 0
            hidden = self.model.embed_tokens(input_ids)
        hidden = self.run_layers(hidden, attention_mask, position_ids, first=first)
        normed: Tensor = self.model.norm(hidden)
        return normed

    def run_layers(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        *,
        first: int = 0,
        end: int | None = None,
    ) -> Tensor:
        """Return the output of some layers, one after the other."""
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=None,
            position_ids=position_ids,
        )
        rotations = self.model.rotary_emb(hidden, position_ids=position_ids)
        for layer in self.model.layers[first:end]:
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_embeddings=rotations,
                position_ids=position_ids,
                use_cache=False,
            )
        return hidden

    def _looked_up(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        """Return the lower layers' outputs, or None where one of the rows is not kept."""
        num_rows, length = input_ids.shape
        lengths = [length] * num_rows
        if attention_mask is not None:
            lengths = attention_mask.sum(dim=1).tolist()
        places = []
        for row, num_tokens in zip(input_ids, lengths, strict=True):
            place = self._index.get(_key(row[length - num_tokens :]))
            if place is None:
                return None
            places.append(place)
        hidden = self._states.new_zeros(num_rows, length, self.config.hidden_size)
        for row_hidden, (start, end) in zip(hidden, places, strict=True):
            row_hidden[length - (end - start) :] = self._states[start:end]
        return hidden.to(self.dtype)


AutoConfig.register(CachedConfig.model_type, CachedConfig)
AutoModelForCausalLM.register(CachedConfig, CachedForCausalLM)


def _key(token_ids: Tensor) -> bytes:
    key: bytes = token_ids.to(torch.int32).numpy().tobytes()
    return key


def train(
    model: nn.Module,
    examples: TokenizedExamples,
    *,
    pad_token_id: int,
    learning_rate: float,
    local_steps: int,
    batch_size: int,
    seed: int,
    on_step: OnStep,
    penalty: Penalty | None = None,
    moments: Mapping[str, Moments] | None = None,
    **_: Any,
) -> TrainReport:
    """Minimize the loss of the completions, as the package's trainer does."""

    def batch_loss(rows: list[int]) -> tuple[Tensor, int]:
        batch = CAUSAL_LM.collate([examples.example(row) for row in rows], pad_token_id)
        mask = batch["attention_mask"]
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        inner = inner_model(model)
        hidden = inner.last_hidden(batch["input_ids"], mask, positions)
        # Only what predicts a token of a completion is projected to the vocabulary.
        hidden, labels = next_token_pairs(hidden, batch)
        is_target = labels != IGNORED
        logits = inner.lm_head(hidden[is_target])
        return F.cross_entropy(logits.float(), labels[is_target]), int(is_target.sum())

    return train_plainly(
        model,
        batch_loss,
        num_examples=len(examples),
        learning_rate=learning_rate,
        local_steps=local_steps,
        batch_size=batch_size,
        seed=seed,
        on_step=on_step,
        penalty=penalty,
        moments=moments,
    )


# ── made once ─────────────────────────────────────────────────────────────────────────────────────


def make(
    source: Path,
    folder: Path,
    rows: list[tuple[int, ...]],
    num_cached_layers: int,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write the model for some data, with the outputs of its lower layers.

    The vocabulary is that of the data: the embeddings of all other tokens are left out, and the
    tokens that are left are renumbered in their order.

    Args:
        source: The directory of SmolLM2-135M, or of another Llama with tied embeddings.
        folder: The directory to write.
        rows: Token ids of whole examples, end token included.
        num_cached_layers: Layers whose outputs are kept.
        dtype: The dtype of the weights.
    """
    if (folder / "config.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    kept = sorted({token for row in rows for token in row} | _special_tokens(config, tokenizer))
    new_ids = {old: new for new, old in enumerate(kept)}
    _write_tokenizer(source, folder, tokenizer, new_ids)
    cache = (folder / "lower-layers.bin").resolve()  # not .safetensors: it is data, not weights
    config |= {key: new_ids[config[key]] for key in SPECIAL_IDS if config.get(key) is not None}
    config |= {
        "dtype": str(dtype).removeprefix("torch."),
        "model_type": CachedConfig.model_type,
        "num_cached_layers": num_cached_layers,
        "cache": str(cache),
        "vocab_size": len(kept),
    }
    model = _trimmed(source, CachedConfig(**config), kept, dtype)
    renumbered = [tuple(new_ids[token] for token in row) for row in rows]
    _write_cache(model, cache, sorted(set(renumbered), key=len))
    model.save_pretrained(folder)


def _special_tokens(config: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> set[int]:
    added = {token["id"] for token in tokenizer["added_tokens"]}
    return added | {config[key] for key in SPECIAL_IDS if config.get(key) is not None}


def _write_tokenizer(
    source: Path, folder: Path, tokenizer: dict[str, Any], new_ids: Mapping[int, int]
) -> None:
    """Write the tokenizer with new ids; tokens that are left out get ids above the vocabulary.

    Their merges stay, so every text is split as before.
    """
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    others = sorted(set(vocabulary.values()) - set(new_ids))
    ids = dict(new_ids) | {old: len(new_ids) + place for place, old in enumerate(others)}
    tokenizer["model"]["vocab"] = {token: ids[old] for token, old in vocabulary.items()}
    for token in tokenizer["added_tokens"]:
        token["id"] = ids[token["id"]]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        if (source / name).is_file():
            shutil.copy(source / name, folder / name)


def _trimmed(
    source: Path, config: CachedConfig, kept: list[int], dtype: torch.dtype
) -> CachedForCausalLM:
    """Return the model with the embeddings of some tokens only."""
    whole = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    state = whole.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name][kept]
    model = CachedForCausalLM(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.load_state_dict(state)
    model.tie_weights()
    return model


def _write_cache(model: CachedForCausalLM, file: Path, rows: list[tuple[int, ...]]) -> None:
    states = []
    starts_of_batches = range(0, len(rows), ROWS_PER_BATCH)
    for start in track(starts_of_batches, "Computing lower layers", console=Console(stderr=True)):
        batch = rows[start : start + ROWS_PER_BATCH]
        input_ids = pad_left(batch, 0)
        mask = pad_left([[1] * len(row) for row in batch], 0)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        with torch.no_grad():
            embedded = model.model.embed_tokens(input_ids)
            hidden = model.run_layers(embedded, mask, positions, end=model.config.num_cached_layers)
        for row, row_hidden in zip(batch, hidden, strict=True):
            states.append(row_hidden[-len(row) :].clone())
    starts = torch.tensor([0, *map(len, rows)]).cumsum(0)
    token_ids = torch.tensor([token for row in rows for token in row], dtype=torch.int32)
    tensors = {"states": torch.cat(states), "starts": starts, "token_ids": token_ids}
    scratch = file.with_suffix(".part")
    save_file(tensors, scratch)
    scratch.replace(file)
