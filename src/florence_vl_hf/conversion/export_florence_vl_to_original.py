# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""The way back: a Florence-VL of this package becomes a checkpoint that the original code loads."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import BartForConditionalGeneration, PreTrainedConfig
from transformers.utils import logging

from ..modeling import FlorenceVLConfig
from ..modeling.configuration_florence_vl import DEFAULT_PROMPT_TOKEN_IDS, IMAGE_FEATURE
from ..processing import FlorenceVLProcessor
from .convert_florence_vl_to_hf import (
    CHECKPOINT_FILES,
    TABLES_OF_WORDS,
    check_all_paired,
    resolve_folder,
    tensor_shapes,
)
from .errors import CheckpointError
from .key_mapping import ORIGINAL_TOWER, to_converted, to_original
from .original_config import is_first_release, text_config_to_original, tower_config_to_first_release
from .original_model import TOWER_FOLDER, find_tower_tensors
from .original_processor import IMAGE_TOKEN, UNUSED_ROW
from .output_folder import TensorToWrite, check_disk_space, folder_in_place_when_complete, write_weights
from .stored_tensors import StoredTensor, find_tensors, read_json


logger = logging.get_logger(__name__)

# Where the original's code of Florence-2 is, with weights of the size of every published Florence-VL. The original
# builds its tower from there before it loads the checkpoint's weights over it.
ORIGINAL_TOWER_ID = "jiuhai/florence-llama-vision-tower"
# What the original trained with, where a tokenizer has no limit of its own.
MODEL_MAX_LENGTH = 2048

# Names in Florence-2's first release of what this package never builds, and of the head, which is the table of words.
DECODER, HEAD = "language_model.model.decoder.", "language_model.lm_head.weight"

# What the original's Transformers, 4.43, calls the class of a tokenizer that is told by its tokenizer.json alone. With
# any other, `use_fast=False` of the original's code would ask for a tokenizer.model.
TOKENIZER_CLASS = "PreTrainedTokenizerFast"
# Settings of a tokenizer that do not depend on its class.
TOKENIZER_SETTINGS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "clean_up_tokenization_spaces",
)


@dataclass
class ExportPlan:
    """An export that was checked from end to end, but wrote nothing yet."""

    files: dict[str, dict[str, Any]]
    tensors: dict[str, TensorToWrite]
    remarks: list[str]


def export(
    source: str | Path,
    output: str | Path,
    vision_tower: str | Path | None = None,
    max_shard_size: int | str = "5GB",
) -> ExportPlan:
    """
    Turn a converted or trained Florence-VL into a folder that the original code loads.

    Args:
        source (`str` or `Path`): Folder or Hub id of the model.
        output (`str` or `Path`): Folder to make. It appears when it is complete.
        vision_tower (`str` or `Path`, *optional*): Folder or Hub id of a Florence-2, which gives the tensors of the
            decoder. The original builds a decoder, but throws its work away.
        max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`): Size of a file of weights at most.

    Returns:
        `ExportPlan`: What was written, with what there is to know about it.

    Raises:
        CheckpointError: If the original cannot express the model, or files are missing or damaged. Nothing is written
            then.
    """
    with folder_in_place_when_complete(Path(output)) as folder:
        plan = plan_export(
            resolve_folder(source, CHECKPOINT_FILES),
            vision_tower and resolve_folder(vision_tower, CHECKPOINT_FILES),
        )
        for remark in plan.remarks:
            logger.warning(remark)
        check_disk_space(folder, plan.tensors)
        write_weights(folder, plan.tensors, max_shard_size)
        for name, content in plan.files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return plan


def plan_export(source: Path, vision_tower: Path | None = None) -> ExportPlan:
    """
    Read a model's folder, without its weights, and check that all of it can be expressed by the original.

    Raises:
        CheckpointError: If it cannot, naming what.
    """
    config, processor = _read_model(source)
    tower_config, tower_inexpressible = tower_config_to_first_release(config)
    text_config, text_inexpressible = text_config_to_original(config.text_config)
    inexpressible = [*_inexpressible(config, processor), *tower_inexpressible, *text_inexpressible]
    if inexpressible:
        raise CheckpointError(
            f"The original code has no way to express {'; '.join(inexpressible)}. Export only what it can run."
        )

    stored = find_tensors(source)
    words = stored.get(TABLES_OF_WORDS[0])
    tokenizer = _original_tokenizer(source)
    num_rows = config.text_config.vocab_size if words is None else _num_original_rows(config, tokenizer, words)
    text_config["vocab_size"] = num_rows
    tensors = _plan_tensors(config, stored, num_rows)
    remarks = []
    dtype = tensors["model.embed_tokens.weight"].dtype
    if vision_tower is not None:
        tensors |= _plan_decoder(config.vision_config.text_config, find_tower_tensors(vision_tower), dtype)
        # Beside what is known here, what only the original's code knows: where it is, for one.
        theirs = read_json(vision_tower / "config.json")
        tower_config = _merged(theirs, tower_config) if is_first_release(theirs) else tower_config
    else:
        remarks.append(
            "Florence-2's decoder is not part of this model, so the original will start it at random, and warn. It "
            "throws the decoder's work away: its answers are the same. To fill it, give a Florence-2 as "
            "--vision-tower."
        )
    remarks.append(
        f"config.json names {ORIGINAL_TOWER_ID} as mm_vision_tower, whose code the original builds the tower with; "
        f"change it if yours is elsewhere, or if the tower is not of the size of Florence-2-large."
    )
    generation_config = source / "generation_config.json"
    files = {
        "config.json": _original_config(config, processor, text_config, dtype),
        "generation_config.json": _generation_config(generation_config, num_rows),
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": _tokenizer_config(source, tokenizer, processor),
        f"{TOWER_FOLDER}/config.json": tower_config,
        f"{TOWER_FOLDER}/preprocessor_config.json": _preprocessor_config(config, processor),
    }
    return ExportPlan(files, tensors, remarks)


def _read_model(source: Path) -> tuple[FlorenceVLConfig, FlorenceVLProcessor]:
    model_type = read_json(source / "config.json").get("model_type")
    if model_type != FlorenceVLConfig.model_type:
        raise CheckpointError(
            f"{source} has model type {model_type!r}, expected {FlorenceVLConfig.model_type!r}; give a folder that "
            f"`florence-vl convert` or `save_pretrained` wrote."
        )
    config = FlorenceVLConfig.from_pretrained(source)
    try:
        processor = FlorenceVLProcessor.from_pretrained(source)
    except Exception as error:
        # Each tokenizer and image processor fails in its own way.
        raise CheckpointError(f"The processor in {source} cannot be loaded ({error}); save it again.") from error
    return config, processor


def _inexpressible(config: FlorenceVLConfig, processor: FlorenceVLProcessor) -> list[str]:
    """What of fusion, prompts, projector and pictures the original's code, where they are constants, lacks."""
    features = [IMAGE_FEATURE, *DEFAULT_PROMPT_TOKEN_IDS]
    found = []
    if config.fusion_strategy != "channel":
        found.append(f"fusion_strategy {config.fusion_strategy!r} (only 'channel')")
    if list(config.fusion_features) != features:
        found.append(f"fusion_features {list(config.fusion_features)} (only {features})")
    for name in config.fusion_prompts:
        if config.prompt_token_ids[name] != DEFAULT_PROMPT_TOKEN_IDS.get(name):
            found.append(f"the prompt {name!r}, {config.prompts[name]!r}")
    if config.mask_prompt_padding:
        found.append("mask_prompt_padding")
    if config.projector_hidden_act != "gelu":
        found.append(f"projector_hidden_act {config.projector_hidden_act!r} (only 'gelu')")
    if getattr(config, "quantization_config", None) is not None:
        found.append("quantized weights")
    if processor.image_processor.do_center_crop:
        found.append("do_center_crop of the image processor")
    return found


def _original_config(
    config: FlorenceVLConfig, processor: FlorenceVLProcessor, text_config: dict[str, Any], dtype: torch.dtype
) -> dict[str, Any]:
    family = "".join(part.title() for part in text_config["model_type"].split("_"))
    return text_config | {
        "architectures": [f"{family}ForCausalLM"],
        "torch_dtype": str(dtype).removeprefix("torch."),
        "mm_vision_tower": ORIGINAL_TOWER_ID,
        "mm_hidden_size": config.vision_config.vision_config.projection_dim,
        "mm_projector_type": f"mlp{config.projector_depth}x_gelu",
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "image_aspect_ratio": "pad" if processor.image_processor.do_pad else "square",
        "tokenizer_model_max_length": _model_max_length(processor),
        "tokenizer_padding_side": "right",
        "use_mm_proj": True,
        "mm_projector_lr": None,
        "vision_tower_lr": None,
        "freeze_mm_mlp_adapter": False,
        "tune_mm_mlp_adapter": False,
        "tune_entire_model": False,
    }


def _model_max_length(processor: FlorenceVLProcessor) -> int:
    # A tokenizer without a limit says a number beyond all measure.
    length = processor.tokenizer.model_max_length
    return length if length < 2**31 else MODEL_MAX_LENGTH


def _preprocessor_config(config: FlorenceVLConfig, processor: FlorenceVLProcessor) -> dict[str, Any]:
    pictures = processor.image_processor
    size = {"height": config.image_size, "width": config.image_size}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "Florence2Processor",
        "image_seq_length": config.num_image_tokens,
        "do_center_crop": False,
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "resample": 3,
        "size": size,
        "crop_size": size,
        "image_mean": list(pictures.image_mean),
        "image_std": list(pictures.image_std),
    }


def _generation_config(path: Path, num_rows: int) -> dict[str, Any]:
    settings = read_json(path) if path.is_file() else {}
    suppressed = [row for row in settings.pop("suppress_tokens", None) or [] if row < num_rows]
    return settings | ({"suppress_tokens": suppressed} if suppressed else {})


def _original_tokenizer(source: Path) -> dict[str, Any]:
    """The model's tokenizer.json without the tokens of the conversion, in a form that tokenizers 0.19 reads."""
    tokenizer = read_json(source / "tokenizer.json")
    added = [
        token for token in tokenizer.get("added_tokens", []) if token["content"] != UNUSED_ROW.format(token["id"])
    ]
    image_token_id = next((token["id"] for token in added if token["content"] == IMAGE_TOKEN), None)
    # One with tokens after it was the original's own.
    if image_token_id == _last_id(tokenizer | {"added_tokens": added}):
        added = [token for token in added if token["content"] != IMAGE_TOKEN]
    # Since 0.20 a merge is a pair; before, it was its two parts with a space between, and pairs cannot be read.
    merges = tokenizer["model"].get("merges")
    if merges and not any(" " in part for merge in merges for part in merge if not isinstance(merge, str)):
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
        tokenizer["model"]["merges"] = merges
    return tokenizer | {"added_tokens": added}


def _last_id(tokenizer: dict[str, Any]) -> int:
    vocabulary = tokenizer["model"]["vocab"]
    # Unigram models list their words, others number them.
    words = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    return max([*words, *(token["id"] for token in tokenizer["added_tokens"])])


def _tokenizer_config(source: Path, tokenizer: dict[str, Any], processor: FlorenceVLProcessor) -> dict[str, Any]:
    saved = read_json(source / "tokenizer_config.json")
    special = [
        token["content"]
        for token in tokenizer["added_tokens"]
        if token["content"] in (saved.get("extra_special_tokens") or [])
    ]
    return {
        "tokenizer_class": TOKENIZER_CLASS,
        "model_max_length": _model_max_length(processor),
        "padding_side": "right",
        "model_input_names": ["input_ids", "attention_mask"],
        **{name: saved[name] for name in TOKENIZER_SETTINGS if saved.get(name) is not None},
        **({"additional_special_tokens": special} if special else {}),
    }


def _num_original_rows(config: FlorenceVLConfig, tokenizer: dict[str, Any], words: StoredTensor) -> int:
    """Rows of the embedding table without those that a conversion added: zeros, from `<image>` on."""
    rows, image_row = config.text_config.vocab_size, config.image_token_id
    if image_row == _last_id(tokenizer) + 1 and not words.read()[image_row:].any():
        return image_row
    return rows


def _plan_tensors(
    config: FlorenceVLConfig, stored: dict[str, StoredTensor], num_rows: int
) -> dict[str, TensorToWrite]:
    """Pair every tensor of the model with its names in the original, and complain of all that does not pair."""
    shapes = tensor_shapes(config)
    unknown = [str(tensor) for name, tensor in stored.items() if name not in shapes]
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    check_all_paired(unknown, [name for name in shapes if name not in stored])

    tensors = {}
    for name, shape in shapes.items():
        if stored[name].shape != shape:
            raise CheckpointError(
                f"{stored[name]} has shape {stored[name].shape}, expected {shape} from the configuration; the two do "
                f"not belong together."
            )
        shape = (num_rows, *shape[1:]) if name in TABLES_OF_WORDS else shape
        for original in to_original(name):
            if original.alias:
                continue
            made_shape = shape[::-1] if original.transposed else shape
            make = partial(_make_tensor, stored[name], original.transposed, shape[:1])
            tensors[original.name] = TensorToWrite(stored[name].dtype, made_shape, make)
    return tensors


def _make_tensor(stored: StoredTensor, transposed: bool, rows: tuple[int, ...]) -> torch.Tensor:
    tensor = stored.read()
    tensor = tensor[: rows[0]] if rows else tensor
    return tensor.T if transposed else tensor


def _plan_decoder(
    bart: PreTrainedConfig, tower: dict[str, StoredTensor], dtype: torch.dtype
) -> dict[str, TensorToWrite]:
    """The tensors of a Florence-2 that only its decoder needs, and its head, under the original's names."""
    with torch.device("meta"):
        decoder = BartForConditionalGeneration(bart)
    shapes = {f"language_model.{name}": tuple(tensor.shape) for name, tensor in decoder.state_dict().items()}
    shapes = {name: shape for name, shape in shapes.items() if to_converted(ORIGINAL_TOWER + name).name is None}
    # Zeros that Transformers' own Florence-2 does not store.
    check_all_paired([], [name for name in shapes if name not in tower and name.startswith(DECODER)])
    if HEAD in tower:
        shapes[HEAD] = (bart.vocab_size, bart.d_model)
    tensors = {}
    for name, shape in shapes.items():
        if name not in tower:
            continue
        if tower[name].shape != shape:
            raise CheckpointError(
                f"{tower[name]} has shape {tower[name].shape}, expected {shape}; give a Florence-2 of the same size "
                f"as --vision-tower."
            )
        make = partial(_read_as, tower[name], dtype)
        tensors[ORIGINAL_TOWER + name] = TensorToWrite(dtype, shape, make)
    return tensors


def _read_as(stored: StoredTensor, dtype: torch.dtype) -> torch.Tensor:
    return stored.read().to(dtype)


def _merged(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """A configuration as it was, but for what is known here."""
    parts = {name: theirs.get(name, {}) | ours[name] for name in ("vision_config", "text_config")}
    return theirs | ours | parts


__all__ = ["ExportPlan", "export", "plan_export"]
