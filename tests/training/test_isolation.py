"""Training on pairs computes what evaluation computes, wherever a model applies dropout."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from fedmomentum.config.training import LocalTraining
from fedmomentum.data.tokenized import TokenizedExamples
from fedmomentum.evaluation.teacher_forcing import measure_reference
from fedmomentum.objectives.preference import DPO
from fedmomentum.training.trainer import train

SIZES = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def opt():
    """OPT applies dropout as a function, in its layers too, and drops whole layers."""
    config = OPTConfig(ffn_dim=64, word_embed_proj_dim=32, dropout=0.5, layerdrop=0.5, **SIZES)
    return OPTForCausalLM(config)


def llama():
    return LlamaForCausalLM(LlamaConfig(intermediate_size=64, attention_dropout=0.1, **SIZES))


@pytest.mark.parametrize("build", [opt, llama])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_does_not_differ_from_its_reference_by_dropout(build, checkpointing):
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(build(), lora)
    layer = next(m for n, m in model.named_modules() if n.endswith("layers.1"))
    runs = []
    layer.self_attn.register_forward_hook(lambda *_: runs.append(layer.training))
    chosen = tuple(tuple(range(3 + row, 15 + row)) for row in range(4))
    rejected = tuple((*ids[:6], *range(30, 36)) for ids in chosen)
    examples = TokenizedExamples(
        chosen, (6,) * 4, ("",) * 4, (False,) * 4, 0, rejected_ids=rejected
    )
    examples = measure_reference(model, examples, pad_token_id=1)
    runs.clear()
    losses = []
    hyperparameters = LocalTraining(
        1e-9, 4, local_steps=2, arguments={"gradient_checkpointing": checkpointing}
    )
    train(
        model,
        examples,
        hyperparameters,
        pad_token_id=1,
        seed=0,
        objective=DPO(),
        on_step=lambda step, num_steps, loss: losses.append(loss),
    )
    assert losses == [pytest.approx(math.log(2), abs=1e-6)] * 2
    # With checkpointing the layer runs once more in each backward pass.
    assert runs == [False] * (4 if checkpointing else 2)
    assert all(module.training for module in model.modules())
    assert getattr(layer, "_gradient_checkpointing_func", checkpoint) is checkpoint
