"""LoRA adapters: tensors, directories and configurations in PEFT's format.

Only `peft_model.py` and `peft_folder.py` import peft.
"""
