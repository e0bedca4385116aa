"""The model that client and server make from the run's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM


def lora_config(run_config: Mapping[str, Any]) -> LoraConfig:
    """Return the adapter's configuration, which the strategy needs for its scaling."""
    return LoraConfig(
        r=int(run_config["lora.r"]),
        lora_alpha=int(run_config["lora.alpha"]),
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
    )


def get_model(run_config: Mapping[str, Any]) -> PeftModel:
    """Return the base model with a fresh adapter."""
    base = AutoModelForCausalLM.from_pretrained(
        str(run_config["model.name"]), dtype=torch.float32, trust_remote_code=False
    )
    return get_peft_model(base, lora_config(run_config))
