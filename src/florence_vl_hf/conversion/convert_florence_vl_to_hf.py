# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Conversion of an original Florence-VL checkpoint into a folder that the Auto classes load."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import GenerationConfig
from transformers.utils import logging

from ..modeling import FlorenceVLConfig, FlorenceVLForConditionalGeneration
from ..processing import FlorenceVLProcessor
from .errors import CheckpointError
from .key_mapping import ORIGINAL_TOWER, to_converted, to_original
from .original_model import read_original_model, tower_folder
from .output_folder import TensorToWrite, check_disk_space, folder_in_place_when_complete, write_weights
from .stored_tensors import StoredTensor, find_tensors, read_json


logger = logging.get_logger(__name__)

# Files of a Hub repository that a conversion reads.
CHECKPOINT_FILES = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt"]
TOWER_CONFIG_FILES = ["config.json", "preprocessor_config.json"]
# The tables that have a row per token, to which `<image>` may add rows.
TABLES_OF_WORDS = ("model.language_model.embed_tokens.weight", "lm_head.weight")

# What of a generation_config.json only counts when it says `do_sample`.
SAMPLING_FLAGS = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


@dataclass
class ConversionPlan:
    """A conversion that was checked from end to end, but wrote nothing yet."""

    config: FlorenceVLConfig
    processor: FlorenceVLProcessor
    generation_config: GenerationConfig
    tensors: dict[str, TensorToWrite]
    assumptions: list[str]


def plan_conversion(
    source: Path,
    vision_tower: Path | None = None,
    image_feature_source: list[str] | None = None,
    dtype: torch.dtype | None = None,
    chat_template: str | None = None,
) -> ConversionPlan:
    """
    Read an original checkpoint folder, without its weights, and check that all of it can be converted.

    Args:
        source (`Path`): Folder of the original checkpoint.
        vision_tower (`Path`, *optional*): Folder of its Florence-2, where `source` has none. The checkpoint's own
            weights win over this folder's.
        image_feature_source (`list[str]`, *optional*): Instead of what the tower's configuration says.
        dtype (`torch.dtype`, *optional*): Of the converted weights. By default each tensor keeps its own.
        chat_template (`str`, *optional*): One of `CHAT_TEMPLATES`. By default the one that fits the language model.

    Raises:
        CheckpointError: If anything is missing, unexpected, misshapen or damaged. The message names file and tensor.
    """
    stored = find_tensors(source)
    if not stored:
        raise CheckpointError(f"{source} holds no weights; fetch its model-*.safetensors or pytorch_model-*.bin.")
    tower = tower_folder(source, vision_tower)
    if tower is not None and not any(name.startswith(ORIGINAL_TOWER) for name in stored):
        stored |= {ORIGINAL_TOWER + name: tensor for name, tensor in find_tensors(tower).items()}
    model = read_original_model(source, vision_tower, image_feature_source, stored)

    tensors = _plan_tensors(model.config, stored, model.num_original_rows, dtype)
    model.config.dtype = tensors[TABLES_OF_WORDS[0]].dtype
    return ConversionPlan(
        config=model.config,
        processor=model.build_processor(chat_template),
        generation_config=_generation_config(source, model.config, model.num_original_rows),
        tensors=tensors,
        assumptions=model.tower.assumptions,
    )


def _plan_tensors(
    config: FlorenceVLConfig, stored: dict[str, StoredTensor], num_original_rows: int, dtype: torch.dtype | None
) -> dict[str, TensorToWrite]:
    """Pair every tensor of the model with one that is stored, and complain of all that does not pair."""
    with torch.device("meta"):
        model = FlorenceVLForConditionalGeneration(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    unknown = [
        str(tensor)
        for name, tensor in stored.items()
        if (mapped := to_converted(name)) is None or (mapped.name is not None and mapped.name not in expected)
    ]
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]

    # A tied tensor may be stored under several names: the one that the table lists first counts.
    sources = {
        name: next(((stored[m.name], m.transposed) for m in to_original(name) if m.name in stored), None)
        for name in expected
    }
    missing = [name for name, source in sources.items() if source is None]
    if unknown or missing:
        raise CheckpointError(
            "The checkpoint does not fit its configuration. "
            + (f"Tensors that nothing uses: {_some(unknown)}. " if unknown else "")
            + (
                f"Tensors that are missing: {_some([to_original(name)[0].name for name in missing])}. "
                if missing
                else ""
            )
            + "Fetch all of its files again; if they are whole, it is no Florence-VL that is known here."
        )

    tensors = {}
    for name, shape in expected.items():
        tensor, transposed = sources[name]
        wanted = (num_original_rows, *shape[1:]) if name in TABLES_OF_WORDS else shape
        wanted = wanted[::-1] if transposed else wanted
        if tensor.shape != wanted:
            raise CheckpointError(
                f"{tensor} has shape {tensor.shape}, expected {wanted} from the configuration; the two do not belong "
                f"together."
            )
        make = partial(_make_tensor, tensor.read, transposed, shape, dtype)
        tensors[name] = TensorToWrite(dtype if dtype and tensor.dtype.is_floating_point else tensor.dtype, shape, make)
    return tensors


def _make_tensor(
    read: Callable[[], torch.Tensor], transposed: bool, shape: tuple[int, ...], dtype: torch.dtype | None
) -> torch.Tensor:
    tensor = read()
    if transposed:
        tensor = tensor.T
    if tensor.shape[:1] != shape[:1]:
        # Rows for `<image>` and up to the next multiple of 64: zero, so that they are the same on every machine.
        tensor = torch.cat([tensor, tensor.new_zeros(shape[0] - tensor.shape[0], *shape[1:])])
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _some(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _generation_config(source: Path, config: FlorenceVLConfig, num_original_rows: int) -> GenerationConfig:
    path = source / "generation_config.json"
    settings: dict[str, Any] = read_json(path) if path.is_file() else {}
    # Flags without effect, which older versions of Transformers let pass and newer ones refuse to save.
    without_effect = () if settings.get("do_sample") else SAMPLING_FLAGS
    settings = {k: v for k, v in settings.items() if k not in without_effect and not k.startswith("_")}
    generation_config = GenerationConfig(**settings)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(generation_config, name) is None:
            setattr(generation_config, name, getattr(config.text_config, name))
    # Rows that were added to round their number up are no words. The model itself never says `<image>`.
    generation_config.suppress_tokens = list(range(num_original_rows, config.text_config.vocab_size)) or None
    return generation_config


def convert(
    source: str | Path,
    output: str | Path,
    vision_tower: str | Path | None = None,
    image_feature_source: list[str] | None = None,
    dtype: torch.dtype | None = None,
    chat_template: str | None = None,
    max_shard_size: int | str = "5GB",
) -> ConversionPlan:
    """
    Convert an original Florence-VL checkpoint into a folder that the Auto classes load.

    Args:
        source (`str` or `Path`): Folder or Hub id of the original checkpoint, such as `jiuhai/florence-vl-8b-sft`.
        output (`str` or `Path`): Folder to make. It appears when it is complete.
        vision_tower (`str` or `Path`, *optional*): Folder or Hub id of its Florence-2, where `source` has none.
        image_feature_source (`list[str]`, *optional*): Instead of what the tower's configuration says.
        dtype (`torch.dtype`, *optional*): Of the converted weights. By default each tensor keeps its own.
        chat_template (`str`, *optional*): One of `CHAT_TEMPLATES`. By default the one that fits the language model.
        max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`): Size of a file of weights at most.

    Returns:
        `ConversionPlan`: What was written, with what had to be assumed.

    Raises:
        CheckpointError: If the checkpoint cannot be converted. Nothing is written then.
    """
    output = Path(output)
    with folder_in_place_when_complete(output) as folder:
        plan = plan_conversion(
            resolve_folder(source, CHECKPOINT_FILES),
            vision_tower and resolve_folder(vision_tower, TOWER_CONFIG_FILES),
            image_feature_source,
            dtype,
            chat_template,
        )
        for assumed in plan.assumptions:
            logger.warning(assumed)
        check_disk_space(folder, plan.tensors)
        write_weights(folder, plan.tensors, max_shard_size)
        plan.config.save_pretrained(folder)
        plan.generation_config.save_pretrained(folder)
        plan.processor.save_pretrained(folder)
    return plan


def resolve_folder(folder_or_id: str | Path, files: list[str]) -> Path:
    """A folder as it is, or that of a Hub repository after its `files` were downloaded."""
    folder = Path(folder_or_id)
    if folder.is_dir():
        return folder
    if folder.exists() or len(folder.parts) != 2 or folder.is_absolute() or folder.parts[0] in (".", ".."):
        raise CheckpointError(f"{folder_or_id} is neither a folder nor the id of a Hub repository.")
    try:
        return Path(snapshot_download(str(folder_or_id), allow_patterns=files))
    except Exception as error:
        # Offline, not found, gated, no token: huggingface_hub says it well, in one of many exceptions.
        raise CheckpointError(f"{folder_or_id} is no folder here, and cannot be had from the Hub: {error}") from error


__all__ = ["ConversionPlan", "convert", "plan_conversion", "resolve_folder"]
