# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Training: data, collator, stages, LoRA, recipes and the trainer."""

from importlib.util import find_spec


if find_spec("datasets") is None:
    raise ModuleNotFoundError("Training requires datasets; run `pip install 'florence_vl_hf[train]'`.")

from ..quantization import quantization_config
from .adapters import lora_config, lora_target_modules, merge_adapter
from .arguments import RECIPES, FlorenceVLTrainingArguments, read_recipe
from .collator import FlorenceVLCollator
from .data_loading import load_conversations
from .samples import SampleError, to_messages
from .stages import STAGES, register_training_hook, set_trainable
from .trainer import FlorenceVLTrainer, TrainingError
from .training_run import train


__all__ = [
    "RECIPES",
    "STAGES",
    "FlorenceVLCollator",
    "FlorenceVLTrainer",
    "FlorenceVLTrainingArguments",
    "SampleError",
    "TrainingError",
    "load_conversations",
    "lora_config",
    "lora_target_modules",
    "merge_adapter",
    "quantization_config",
    "read_recipe",
    "register_training_hook",
    "set_trainable",
    "to_messages",
    "train",
]
