# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Adapters of the original, merged into a base: a projector alone (pretraining), or LoRA with a projector."""

import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .checkpoint_files import CheckpointError, LazyTensor, read_json, read_tensor_file
from .key_mapping import to_converted


# Files of tensors that replace the base's: of a projector-only checkpoint, and of a LoRA one.
REPLACEMENT_FILES = ("mm_projector.bin", "non_lora_trainables.bin")
LORA_CONFIG = "adapter_config.json"
# What PEFT puts before the names of a model that it wraps.
PEFT_PREFIX = "base_model.model."
# Settings of PEFT without which LoRA cannot be merged by adding a product of two matrices.
SUPPORTED_LORA = {"peft_type": "LORA", "bias": "none", "use_dora": False, "fan_in_fan_out": False}


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter of the original."""
    return any((directory / name).is_file() for name in (*REPLACEMENT_FILES, LORA_CONFIG))


def apply_adapter(tensors: dict[str, LazyTensor], directory: Path) -> dict[str, LazyTensor]:
    """Merge an adapter into the tensors of its base, by converted name. They keep the base's shapes and dtypes."""
    merged = dict(tensors)
    for path in (directory / name for name in REPLACEMENT_FILES if (directory / name).is_file()):
        for stored_name, tensor in read_tensor_file(path).items():
            name = stored_name.removeprefix(PEFT_PREFIX)
            # Projector files are saved with and without the model's prefix.
            mapped = to_converted(name) or to_converted(f"model.{name}")
            if mapped is None or not tensor.dtype.is_floating_point:
                raise CheckpointError(f"{tensor} is not a weight of a Florence-VL; this adapter is of another model.")
            if mapped.name is not None:
                replacement = tensor.transposed() if mapped.transposed else tensor
                _check_fits(tensors, mapped.name, replacement.shape, path)
                merged[mapped.name] = replacement.to(tensors[mapped.name].dtype)
    if (directory / LORA_CONFIG).is_file():
        _merge_lora(merged, directory)
    return merged


def _check_fits(tensors: dict[str, LazyTensor], name: str, shape: tuple[int, ...], adapter: Path) -> None:
    if name not in tensors or tensors[name].shape != shape:
        expected = f"the shape {tensors[name].shape}" if name in tensors else "no tensor"
        raise CheckpointError(
            f"{adapter.name} changes {name} with the shape {shape}, but the base has {expected} there; this "
            f"adapter is of another model."
        )


def _merge_lora(tensors: dict[str, LazyTensor], directory: Path) -> None:
    config = read_json(directory / LORA_CONFIG)
    for field, value in SUPPORTED_LORA.items():
        if (config.get(field) or value) != value:
            problem = f"{directory / LORA_CONFIG} has {field} {config[field]!r}, expected {value!r}"
            raise CheckpointError(f"{problem}; merge it in the original's environment and convert the result.")
    check_patterns(config)
    path = directory / "adapter_model.safetensors"
    path = path if path.is_file() else directory / "adapter_model.bin"
    if not path.is_file():
        raise CheckpointError(f"{directory} has {LORA_CONFIG} but no adapter_model.safetensors or .bin; download it.")

    pairs: dict[str, dict[str, LazyTensor]] = {}
    for stored_name, tensor in read_tensor_file(path).items():
        match = re.fullmatch(re.escape(PEFT_PREFIX) + r"(.+)\.lora_(A|B)(?:\.default)?\.weight", stored_name)
        if match is None or len(tensor.shape) != 2 or not tensor.dtype.is_floating_point:
            raise CheckpointError(
                f"{tensor} is not a matrix of LoRA; merge the adapter in the original's environment."
            )
        pairs.setdefault(match[1], {})[match[2]] = tensor
    for module, pair in pairs.items():
        mapped = to_converted(f"{module}.weight")
        if mapped is None or len(pair) != 2 or pair["A"].shape[0] != pair["B"].shape[1]:
            raise CheckpointError(
                f"{path.name} has no pair of lora_A and lora_B for a {module} of a Florence-VL; this adapter is of "
                f"another model, or incomplete."
            )
        # PEFT matches layers by suffix, so it wraps Florence-2's decoder as well, which this package does not build.
        if mapped.name is not None:
            _check_fits(tensors, mapped.name, (pair["B"].shape[0], pair["A"].shape[1]), path)
            scaling = _scaling(config, module, rank=pair["A"].shape[0])
            load = partial(_load_merged, tensors[mapped.name], pair["A"], pair["B"], scaling)
            tensors[mapped.name] = replace(tensors[mapped.name], load=load)


def _load_merged(base: LazyTensor, down: LazyTensor, up: LazyTensor, scaling: float) -> torch.Tensor:
    weight = base.load()
    return (weight.float() + scaling * (up.load().float() @ down.load().float())).to(weight.dtype)


def check_patterns(config: dict[str, Any]) -> None:
    """Refuse names of layers that PEFT would match as regular expressions, which can take for ever."""
    for field in ("alpha_pattern", "rank_pattern"):
        patterns = config.get(field) or {}
        if not isinstance(patterns, dict) or not all(re.fullmatch(r"[\w.]+", pattern) for pattern in patterns):
            raise CheckpointError(f"{LORA_CONFIG} has {field} {patterns}, expected values by plain names of layers.")


def _scaling(config: dict[str, Any], module: str, rank: int) -> float:
    patterns = config.get("alpha_pattern") or {}
    # Parity: PEFT compares patterns with the end of a module's name (`get_pattern_key`).
    pattern = next((name for name in patterns if f".{module}".endswith(f".{name}")), None)
    alpha = config.get("lora_alpha") if pattern is None else patterns[pattern]
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise CheckpointError(f"{LORA_CONFIG} has lora_alpha {alpha!r} for {module}, expected a number.")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
