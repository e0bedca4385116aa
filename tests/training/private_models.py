"""Tiny models and rows for private training."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from fedmomentum.data.tokenized import TokenizedExamples
from fedmomentum.objectives.collation import IGNORED
from fedmomentum.objectives.objective import BatchLoss, CausalLM

PAD = 0
SETTINGS = dict(
    vocab_size=23,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    initializer_range=0.3,
    pad_token_id=PAD,
)


@dataclass(frozen=True)
class Float64LM(CausalLM):
    """`CausalLM` that does not round logits to float32, so that gradients can be compared to 1e-10."""

    def loss(self, predictions, *, label_smoothing=0.0):
        nll = F.cross_entropy(
            predictions.logits.flatten(0, 1),
            predictions.labels.flatten(),
            ignore_index=IGNORED,
            reduction="sum",
        )
        return BatchLoss(nll, nll, int((predictions.labels != IGNORED).sum()))


def lora_model(*, dtype=torch.float32, classes=0, dropout=0.0, targets=("q_proj", "down_proj")):
    """A one-layer Llama with an adapter of scaling 2, all of whose factors are nonzero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if classes:
            base = LlamaForSequenceClassification(LlamaConfig(**SETTINGS, num_labels=classes))
        else:
            base = LlamaForCausalLM(LlamaConfig(**SETTINGS))
        config = LoraConfig(
            r=3,
            lora_alpha=6,
            target_modules=list(targets),
            lora_dropout=dropout,
            modules_to_save=["score"] if classes else None,
            task_type="SEQ_CLS" if classes else None,
        )
        model = get_peft_model(base, config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    return model.to(dtype)


def random_rows(count=9, *, labels=0, pairs=False) -> TokenizedExamples:
    """Rows of different lengths; their last number is a label where there are labels."""
    generator = torch.Generator().manual_seed(1)

    def ids(length):
        return tuple(
            torch.randint(1, SETTINGS["vocab_size"], (length,), generator=generator).tolist()
        )

    rows = []
    for index in range(count):
        row = ids(3 + index % 5)
        rows.append((*row[:-1], index % labels) if labels else row)
    rejected = tuple((row[0], *ids(1 + index % 3)) for index, row in enumerate(rows))
    reference = tuple((-1.0 - index, -2.0) for index in range(count))
    return TokenizedExamples(
        tuple(rows),
        (1,) * count,
        ("",) * count,
        (False,) * count,
        0,
        rejected_ids=rejected if pairs else (),
        reference=reference if pairs else (),
    )
