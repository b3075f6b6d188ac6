"""LoRA adapters: what is computed with them (`transforms/lora.py`), and PEFT's files of them (`checkpoint/peft.py`)."""

from llama_fn.checkpoint.peft import load, save
from llama_fn.transforms.adapter import LINEAR, Lora, LowRank, Scale
from llama_fn.transforms.lora import apply, init, merge, stack, unmerge, unstack

__all__ = ["LINEAR", "Lora", "LowRank", "Scale", "apply", "init", "load", "merge", "save", "stack", "unmerge",
           "unstack"]
