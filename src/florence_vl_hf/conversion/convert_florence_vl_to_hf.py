# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Conversion of an original Florence-VL checkpoint into a folder that the Auto classes load."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import GenerationConfig
from transformers.utils import logging

from ..modeling import FlorenceVLConfig, FlorenceVLForConditionalGeneration
from ..processing import FlorenceVLProcessor
from .adapters import apply_adapter, is_adapter
from .conversion_plan import ConversionPlan, PlannedTensor
from .errors import CheckpointError
from .key_mapping import ORIGINAL_TOWER, to_converted, to_original
from .model_card import write_model_card
from .original_model import find_tower_tensors, read_original_model, tower_folder
from .output_folder import ByteRange, check_disk_space, folder_in_place_when_complete, write_weights
from .remote_code import write_remote_code
from .stored_tensors import StoredTensor, find_tensors, read_json


logger = logging.get_logger(__name__)

# Files of a Hub repository that a conversion reads.
CHECKPOINT_FILES = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt"]
TOWER_CONFIG_FILES = ["config.json", "preprocessor_config.json", "processor_config.json"]
# The tables that have a row per token, to which `<image>` may add rows.
TABLES_OF_WORDS = ("model.language_model.embed_tokens.weight", "lm_head.weight")

# What of a generation_config.json only counts when it says `do_sample`.
SAMPLING_FLAGS = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


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
    if not stored and is_adapter(source):
        raise CheckpointError(f"{source} holds an adapter alone; name the model that it belongs to as --base.")
    if not stored:
        raise CheckpointError(f"{source} holds no weights; fetch its model-*.safetensors or pytorch_model-*.bin.")
    tower = tower_folder(source, vision_tower)
    if tower is not None and not any(name.startswith(ORIGINAL_TOWER) for name in stored):
        stored |= {ORIGINAL_TOWER + name: tensor for name, tensor in find_tower_tensors(tower).items()}
    model = read_original_model(source, vision_tower, image_feature_source, stored)

    tensors = plan_tensors(model.config, stored, model.num_original_rows, dtype)
    chat_template = chat_template or model.fitting_chat_template
    model.config.dtype = tensors[TABLES_OF_WORDS[0]].dtype
    return ConversionPlan(
        config=model.config,
        processor=model.build_processor(chat_template),
        generation_config=read_generation_config(source, model.config, model.num_original_rows),
        tensors=tensors,
        assumptions=model.tower.assumptions,
        unused=sorted(set(stored) - {tensor.stored.name for tensor in tensors.values()}),
        chat_template=chat_template,
    )


def plan_tensors(
    config: FlorenceVLConfig, stored: dict[str, StoredTensor], num_original_rows: int, dtype: torch.dtype | None
) -> dict[str, PlannedTensor]:
    """Pair every tensor of the model with one that is stored, and complain of all that does not pair."""
    expected = tensor_shapes(config)
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
    check_all_paired(unknown, [to_original(name)[0].name for name in missing])

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
        tensors[name] = _plan_tensor(tensor, transposed, shape, dtype)
    return tensors


def _plan_tensor(
    stored: StoredTensor, transposed: bool, shape: tuple[int, ...], dtype: torch.dtype | None
) -> PlannedTensor:
    made_dtype = dtype if dtype and stored.dtype.is_floating_point else stored.dtype
    is_copy = stored.offset is not None and not transposed and stored.dtype == made_dtype
    num_bytes = stored.dtype.itemsize * torch.Size(stored.shape).numel()
    return PlannedTensor(
        made_dtype,
        shape,
        make=partial(_make_tensor, stored.read, transposed, shape, dtype),
        copy_from=ByteRange(stored.file, stored.offset, num_bytes) if is_copy else None,
        stored=stored,
        transposed=transposed,
    )


def plan_copy(folder: Path, dtype: torch.dtype | None = None) -> ConversionPlan:
    """The plan that writes a model in this package's layout once more, as the base of an adapter."""
    config = FlorenceVLConfig.from_pretrained(folder)
    stored = find_tensors(folder)
    shapes = tensor_shapes(config)
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    if set(stored) != set(shapes) or any(stored[name].shape != shape for name, shape in shapes.items()):
        raise CheckpointError(f"The weights in {folder} do not fit its config.json; save or convert the model again.")
    tensors = {name: _plan_tensor(stored[name], False, shape, dtype) for name, shape in shapes.items()}
    processor = FlorenceVLProcessor.from_pretrained(folder)
    config.dtype = tensors[TABLES_OF_WORDS[0]].dtype
    return ConversionPlan(
        config=config,
        processor=processor,
        generation_config=GenerationConfig.from_pretrained(folder),
        tensors=tensors,
        assumptions=[],
        unused=[],
        chat_template="",
    )


def tensor_shapes(config: FlorenceVLConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a model's checkpoint, by name, also one that is tied."""
    with torch.device("meta"):
        model = FlorenceVLForConditionalGeneration(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def check_all_paired(unknown: list[str], missing: list[str]) -> None:
    """Refuse a checkpoint that has tensors too many or too few, and name them."""
    if unknown or missing:
        raise CheckpointError(
            "The checkpoint does not fit its configuration. "
            + (f"Tensors that nothing uses: {_some(unknown)}. " if unknown else "")
            + (f"Tensors that are missing: {_some(missing)}. " if missing else "")
            + "Fetch all of its files again; if they are whole, it is of a kind that is not known here."
        )


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


def read_generation_config(source: Path, config: FlorenceVLConfig, num_original_rows: int) -> GenerationConfig:
    """How the model in the folder `source` generates, once it has rows beyond its original ones."""
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
    base: str | Path | None = None,
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
        base (`str` or `Path`, *optional*): Where `source` holds an adapter alone (a projector, or LoRA): folder or Hub
            id of the model that it is put onto, in the original's layout or in this package's.

    Returns:
        `ConversionPlan`: What was written, with what had to be assumed.

    Raises:
        CheckpointError: If the checkpoint cannot be converted. Nothing is written then.
    """
    output = Path(output)
    with folder_in_place_when_complete(output) as folder:
        source_folder = resolve_folder(source, CHECKPOINT_FILES)
        base_folder = source_folder if base is None else resolve_folder(base, CHECKPOINT_FILES)
        towers_folder = vision_tower and resolve_folder(vision_tower, TOWER_CONFIG_FILES)
        base_type = read_json(base_folder / "config.json").get("model_type")
        if base is not None and base_type == FlorenceVLConfig.model_type:
            plan = plan_copy(base_folder, dtype)
        else:
            plan = plan_conversion(base_folder, towers_folder, image_feature_source, dtype, chat_template)
        if base is not None:
            plan.tensors = apply_adapter(plan.tensors, source_folder)
        for assumed in plan.assumptions:
            logger.warning(assumed)
        write_model(plan, folder, max_shard_size)
        read_from = {source_folder: source} | ({towers_folder: vision_tower} if vision_tower else {})
        read_from |= {base_folder: base} if base else {}
        write_model_card(folder, plan, source, output.name, read_from, base)
    return plan


def write_model(plan: ConversionPlan, folder: Path, max_shard_size: int | str) -> None:
    """Write all that a plan promises, which then loads with and without this package."""
    check_disk_space(folder, plan.tensors)
    write_weights(folder, plan.tensors, max_shard_size)
    plan.config.save_pretrained(folder)
    plan.generation_config.save_pretrained(folder)
    plan.processor.save_pretrained(folder)
    write_remote_code(folder)


def resolve_folder(folder_or_id: str | Path, files: list[str], **hub_arguments: Any) -> Path:
    """A folder as it is, or that of a Hub repository after its `files` were downloaded."""
    folder = Path(folder_or_id)
    if folder.is_dir():
        return folder
    if folder.exists() or len(folder.parts) != 2 or folder.is_absolute() or folder.parts[0] in (".", ".."):
        raise CheckpointError(f"{folder_or_id} is neither a folder nor the id of a Hub repository.")
    try:
        return Path(snapshot_download(str(folder_or_id), allow_patterns=files, **hub_arguments))
    except Exception as error:
        # Offline, not found, gated, no token: huggingface_hub says it well, in one of many exceptions.
        raise CheckpointError(f"{folder_or_id} is no folder here, and cannot be had from the Hub: {error}") from error


__all__ = ["convert", "plan_conversion", "resolve_folder", "tensor_shapes"]
