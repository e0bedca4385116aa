"""FlowerTune's LLM template with exact LoRA aggregation."""
