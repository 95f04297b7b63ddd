# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Training: data, collator, stages, adapters, and the recipes' trainer."""

from importlib.util import find_spec


if missing := [package for package in ("datasets", "ijson") if find_spec(package) is None]:
    raise ModuleNotFoundError(
        f"Training needs {' and '.join(missing)}, which the extra `train` brings: `pip install "
        f"'florence_vl_hf[train]'`, or `pip install '.[train]'` in the sources."
    )

from .adapters import lora_config, lora_target_modules, merge_adapter, quantization_config
from .arguments import FlorenceVLTrainingArguments, read_recipe
from .collator import FlorenceVLCollator
from .conversation_data import SampleError, load_conversations, to_messages, with_lengths
from .stages import STAGES, set_trainable
from .trainer import FlorenceVLTrainer
from .training_run import train


__all__ = [
    "STAGES",
    "FlorenceVLCollator",
    "FlorenceVLTrainer",
    "FlorenceVLTrainingArguments",
    "SampleError",
    "load_conversations",
    "lora_config",
    "lora_target_modules",
    "merge_adapter",
    "quantization_config",
    "read_recipe",
    "set_trainable",
    "to_messages",
    "train",
    "with_lengths",
]
