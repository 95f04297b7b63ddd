# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Checks of configurations that somebody else wrote: numbers that no model can have, and settings that are invalid."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from .checkpoint_files import CheckpointError


# Fields that count layers. Each layer has at least one tensor.
LAYER_COUNTS = ("num_hidden_layers", "encoder_layers", "decoder_layers", "depths", "projector_depth")
# Fields that something is divided by.
DIVISORS = (
    *("num_attention_heads", "num_key_value_heads", "encoder_attention_heads", "num_heads", "num_groups"),
    *("window_size", "patch_stride", "rope_parameters", "image_std"),
)
# What Transformers and PyTorch raise for invalid settings.
CONFIG_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError),
    StrictDataclassError,
)


@contextmanager
def config_errors(source: Path | str) -> Iterator[None]:
    """Raise the errors of a configuration, or of a model that is built from it, as a `CheckpointError`."""
    try:
        yield
    except CheckpointError:
        raise
    except CONFIG_ERRORS as error:
        raise CheckpointError(
            f"The configuration of {source} is invalid ({type(error).__name__}: {error}); correct it."
        ) from error


def own_fields(config_class: type[PreTrainedConfig]) -> list[str]:
    """Return the fields of a config class that not every config has: sizes, rates and token ids."""
    common = {field.name for field in fields(PreTrainedConfig)} | {"num_labels"}
    return [field.name for field in fields(config_class) if field.name not in common]


def check_layers(raw: dict[str, Any], num_tensors: float, file: Path) -> None:
    """Refuse a `config.json` with more layers than there are tensors, before any layer is built."""
    for name, value in raw.items():
        counts = value if isinstance(value, list) else [value]
        if name in LAYER_COUNTS and not (all(type(n) is int for n in counts) and sum(counts) <= num_tensors):
            raise CheckpointError(
                f"{file} has {name} {value}, but there are only {num_tensors} tensors of weights; correct it, or "
                f"download the missing weights."
            )
        if name in ("text_config", "vision_config") and isinstance(value, dict):
            check_layers(value, num_tensors, file)


def check_config(config: PreTrainedConfig, source: Path) -> None:
    """Refuse a dtype that does not exist, and numbers that no model can have, in a configuration and its parts."""
    if not isinstance(config.dtype, torch.dtype | None):
        raise CheckpointError(f"{source} has dtype {config.dtype}, expected a name such as 'bfloat16'.")
    for name in config.sub_configs:
        check_config(getattr(config, name), source)
    names = [name for name in own_fields(type(config)) if name not in config.sub_configs]
    check_numbers({name: getattr(config, name) for name in names}, getattr(config, "vocab_size", math.inf), source)


def check_numbers(settings: dict[str, Any], vocab_size: float, source: Path) -> None:
    """Refuse settings with numbers that are negative or not finite, divisors of 0, and ids that no token has."""
    for name, value in settings.items():
        limit = vocab_size if name.endswith("_token_id") else math.inf
        if not all(n < limit and (n > 0 or n == 0 and name not in DIVISORS) for n in _numbers(value)):
            raise CheckpointError(f"{source} has {name} {value}, which no model can have; correct its configuration.")


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value
