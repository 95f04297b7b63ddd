# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Adapters of the original, put onto a base: a projector alone (pretraining), or LoRA beside a projector."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .conversion_plan import PlannedTensor
from .errors import CheckpointError
from .key_mapping import to_converted
from .stored_tensors import StoredTensor, list_file, read_json


# Whole tensors that take the place of the base's: of a projector-only checkpoint, and of a LoRA one.
WHOLE_TENSORS = ("mm_projector.bin", "non_lora_trainables.bin")
LORA_CONFIG = "adapter_config.json"
LORA_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# What PEFT puts before the names of a model that it wraps.
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoraDelta:
    """The low-rank change of one weight: `scaling * up @ down`, of shapes `(out, r)` and `(r, in)`."""

    down: StoredTensor
    up: StoredTensor
    scaling: float

    def added_to(self, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        weight = make()
        change = self.scaling * (self.up.read().float() @ self.down.read().float())
        return (weight.float() + change).to(weight.dtype)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter of the original rather than a whole checkpoint."""
    return any((folder / name).is_file() for name in (*WHOLE_TENSORS, LORA_CONFIG))


def apply_adapter(tensors: dict[str, PlannedTensor], folder: Path) -> dict[str, PlannedTensor]:
    """
    Put an adapter onto the planned tensors of its base.

    Args:
        tensors (`dict[str, PlannedTensor]`): The base's, by converted name.
        folder (`Path`): Of the adapter.

    Raises:
        CheckpointError: If a tensor of the adapter has no place in the base, or another shape, or the adapter is not a
            LoRA that can be merged.
    """
    changed = dict(tensors)
    for name, tensor, transposed in _whole_tensors(folder):
        planned = _find(tensors, name, tensor)
        shape = tensor.shape[::-1] if transposed else tensor.shape
        if shape != planned.shape:
            raise CheckpointError(
                f"{tensor} has shape {tensor.shape}, but the base has {planned.shape} there; this is another model's "
                f"adapter."
            )
        make = partial(_made, tensor.read, transposed, planned.dtype)
        changed[name] = replace(planned, make=make, copy_from=None, stored=tensor, transposed=transposed)
    for name, delta in _lora_deltas(folder).items():
        planned = _find(tensors, name, delta.up)
        if (delta.up.shape[0], delta.down.shape[1]) != planned.shape or delta.up.shape[1] != delta.down.shape[0]:
            raise CheckpointError(
                f"{delta.up} and {delta.down} have shapes {delta.up.shape} and {delta.down.shape}, but the base's "
                f"weight has {planned.shape}; this is another model's adapter."
            )
        changed[name] = replace(planned, make=partial(delta.added_to, planned.make), copy_from=None)
    return changed


def _made(read: Callable[[], torch.Tensor], transposed: bool, dtype: torch.dtype) -> torch.Tensor:
    tensor = read()
    return (tensor.T if transposed else tensor).to(dtype)


def _find(tensors: dict[str, PlannedTensor], name: str, tensor: StoredTensor) -> PlannedTensor:
    if name not in tensors:
        raise CheckpointError(f"{tensor} belongs to {name}, which the base has not; this is another model's adapter.")
    return tensors[name]


def _whole_tensors(folder: Path) -> list[tuple[str, StoredTensor, bool]]:
    found = []
    for file_name in WHOLE_TENSORS:
        path = folder / file_name
        for stored_name, tensor in list_file(path).items() if path.is_file() else ():
            name = stored_name.removeprefix(PEFT_PREFIX)
            # Projector files come with and without the model's prefix.
            mapped = to_converted(name) or to_converted(f"model.{name}")
            if mapped is None:
                raise CheckpointError(f"{tensor} is known to no Florence-VL; this is another model's adapter.")
            if mapped.name is not None:
                found.append((mapped.name, tensor, mapped.transposed))
    return found


def _lora_deltas(folder: Path) -> dict[str, LoraDelta]:
    """The changes of a LoRA checkpoint by the converted names of the weights that they change."""
    if not (folder / LORA_CONFIG).is_file():
        return {}
    config = read_json(folder / LORA_CONFIG)
    _check_is_mergeable(config, folder)
    path = next((folder / name for name in LORA_WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise CheckpointError(f"{folder} has {LORA_CONFIG} but none of {', '.join(LORA_WEIGHTS)}; fetch it.")

    halves: dict[str, dict[str, StoredTensor]] = {}
    for stored_name, tensor in list_file(path).items():
        match = re.fullmatch(re.escape(PEFT_PREFIX) + r"(.+)\.lora_(A|B)(?:\.default)?\.weight", stored_name)
        mapped = match and to_converted(f"{match[1]}.weight")
        if mapped is None or mapped.name is None:
            raise CheckpointError(f"{tensor} is no LoRA of a weight of Florence-VL; it cannot be merged.")
        halves.setdefault(mapped.name, {})[match[2]] = tensor
    deltas = {}
    for name, half in halves.items():
        if len(half) != 2:
            raise CheckpointError(f"{path.name} has only one of lora_A and lora_B for {name}; fetch it again.")
        deltas[name] = LoraDelta(half["A"], half["B"], _scaling(config, name, rank=half["A"].shape[0]))
    return deltas


def _check_is_mergeable(config: dict[str, Any], folder: Path) -> None:
    wanted = {"peft_type": "LORA", "bias": "none", "use_dora": False, "fan_in_fan_out": False}
    for field, value in wanted.items():
        if (config.get(field) or value) != value:
            raise CheckpointError(
                f"{folder / LORA_CONFIG} says {field}: {config[field]!r}, expected {value!r}; merge it with PEFT in "
                f"the original's environment, and convert the result."
            )


def _scaling(config: dict[str, Any], name: str, rank: int) -> float:
    patterns = config.get("alpha_pattern") or {}
    alpha = next((a for pattern, a in patterns.items() if re.search(rf"(?:^|\.){pattern}\.weight$", name)), None)
    alpha = config["lora_alpha"] if alpha is None else alpha
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


__all__ = ["apply_adapter", "is_adapter"]
