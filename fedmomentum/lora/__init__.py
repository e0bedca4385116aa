"""LoRA adapters: tensors, directories and configurations in PEFT's format.

Only `peft_model.py`, `peft_folder.py` and `peft_names.py` import peft.
"""
