# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Export a Florence-VL of this package to the original format, which the original code loads."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import BartConfig
from transformers.models.bart.modeling_bart import BartDecoder
from transformers.utils import logging

from ..modeling import FlorenceVLConfig
from ..modeling.configuration_florence_vl import DEFAULT_PROMPT_TOKEN_IDS, IMAGE_FEATURE
from ..processing import IMAGE_TOKEN, FlorenceVLProcessor
from .checkpoint_files import (
    CheckpointError,
    LazyTensor,
    output_directory,
    read_json,
    read_tensors,
    resolve_checkpoint,
    write_tensors,
)
from .key_mapping import ORIGINAL_TOWER, to_original
from .load_original import load_config, load_processor
from .original_checkpoint import EMBEDDING_TABLES, TOWER_DIRECTORY, check_all_paired, read_tower_tensors, tensor_shapes
from .original_config import is_first_release, text_config_to_original, tower_config_to_first_release
from .original_processor import UNUSED_ROW


logger = logging.get_logger(__name__)

# Has the original's code of Florence-2, and weights of the size of every published Florence-VL. The original builds
# its tower from there before it loads the checkpoint's weights over it.
ORIGINAL_TOWER_ID = "jiuhai/florence-llama-vision-tower"
# The length that the original trained with, for tokenizers without a limit of their own.
MODEL_MAX_LENGTH = 2048
# Values of settings that are constants in the original's code.
SUPPORTED_SETTINGS = {
    "fusion_strategy": "channel",
    "fusion_features": [IMAGE_FEATURE, *DEFAULT_PROMPT_TOKEN_IDS],
    "mask_prompt_padding": False,
    "projector_hidden_act": "gelu",
    "quantization_config": None,
    "do_center_crop": False,
}
# Settings of a tokenizer that do not depend on its class.
TOKENIZER_SETTINGS = ("bos_token", "eos_token", "unk_token", "pad_token", "clean_up_tokenization_spaces")


@dataclass
class ExportedCheckpoint:
    """A checkpoint in the original format: JSON files by path, and weights by the original's names."""

    files: dict[str, dict[str, Any]]
    tensors: dict[str, LazyTensor]


def export(
    source: str | Path,
    output: str | Path,
    vision_tower: str | Path | None = None,
    max_shard_size: int | str = "1GB",
) -> ExportedCheckpoint:
    """
    Export a converted or trained Florence-VL to the original format.

    Args:
        source (`str` or `Path`): Directory or Hub id of the model.
        output (`str` or `Path`): Output directory. It is created when it is complete.
        vision_tower (`str` or `Path`, *optional*): Directory or Hub id of a Florence-2 with the decoder's weights. The
            original builds a decoder but does not use its output.
        max_shard_size (`int` or `str`, *optional*, defaults to `"1GB"`): Maximum size of a weight file.

    Returns:
        `ExportedCheckpoint`: What was written.

    Raises:
        CheckpointError: If the original does not support the model, or files are missing or damaged. Nothing is
            written then.
    """
    with output_directory(Path(output)) as directory:
        tower_directory = None if vision_tower is None else resolve_checkpoint(vision_tower)
        checkpoint = read_as_original(resolve_checkpoint(source), tower_directory)
        if vision_tower is None:
            logger.warning(
                "The model has no Florence-2 decoder: the original will start it at random and warn. Its answers do "
                "not depend on the decoder. To include one, give a Florence-2 as --vision-tower."
            )
        logger.warning(
            f"config.json sets mm_vision_tower to {ORIGINAL_TOWER_ID}, whose code the original builds the tower with; "
            f"change it if that code is elsewhere, or if the tower is not of the size of Florence-2-large."
        )
        write_tensors(directory, checkpoint.tensors, max_shard_size)
        for name, content in checkpoint.files.items():
            (directory / name).parent.mkdir(exist_ok=True)
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (directory / name).write_text(text, encoding="utf-8")
    return checkpoint


def read_as_original(source: Path, vision_tower: Path | None = None) -> ExportedCheckpoint:
    """
    Read a model without its weights, and translate all of it to the original format.

    Raises:
        CheckpointError: If the original does not support one of its settings, or weights are missing or unknown.
    """
    model_type = read_json(source / "config.json").get("model_type")
    if model_type != FlorenceVLConfig.model_type:
        raise CheckpointError(f"{source} has model type {model_type!r}, expected {FlorenceVLConfig.model_type!r}.")
    config = load_config(source)
    processor = load_processor(source)
    tower_config, tower_unsupported = tower_config_to_first_release(config)
    text_config, text_unsupported = text_config_to_original(config.text_config)
    if unsupported := [*_unsupported_settings(config, processor), *tower_unsupported, *text_unsupported]:
        raise CheckpointError(f"The original code does not support {'; '.join(unsupported)}; change these settings.")

    tokenizer, num_tokens = _original_tokenizer(read_json(source / "tokenizer.json"))
    tensors = _original_tensors(config, read_tensors(source), num_tokens)
    embeddings = tensors["model.embed_tokens.weight"]
    if vision_tower is not None:
        tensors |= _decoder_tensors(
            config.vision_config.text_config, read_tower_tensors(vision_tower), embeddings.dtype
        )
        base = read_json(vision_tower / "config.json")
        if is_first_release(base):
            # Keep what only the original's code reads, such as `auto_map`.
            parts = {name: base.get(name, {}) | tower_config[name] for name in ("vision_config", "text_config")}
            tower_config = base | tower_config | parts

    images, max_length = processor.image_processor, processor.tokenizer.model_max_length
    # Transformers gives tokenizers without a limit a very large number.
    max_length = max_length if max_length < 2**31 else MODEL_MAX_LENGTH
    family = text_config["model_type"].title().replace("_", "")
    size = {"height": config.image_size, "width": config.image_size}
    generation_file = source / "generation_config.json"
    generation = read_json(generation_file) if generation_file.is_file() else {}
    num_rows = embeddings.shape[0]
    generation["suppress_tokens"] = [row for row in generation.get("suppress_tokens") or [] if row < num_rows]
    files = {
        "config.json": text_config
        | {
            "vocab_size": num_rows,
            "architectures": [f"{family}ForCausalLM"],
            "torch_dtype": str(embeddings.dtype).removeprefix("torch."),
            "mm_vision_tower": ORIGINAL_TOWER_ID,
            "mm_hidden_size": config.vision_config.vision_config.projection_dim,
            "mm_projector_type": f"mlp{config.projector_depth}x_gelu",
            "mm_patch_merge_type": "flat",
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            "mm_vision_select_feature": "patch",
            "mm_vision_select_layer": -2,
            "image_aspect_ratio": "pad" if images.do_pad else "square",
            "tokenizer_model_max_length": max_length,
            "tokenizer_padding_side": "right",
            "use_mm_proj": True,
            "mm_projector_lr": None,
            "vision_tower_lr": None,
            "freeze_mm_mlp_adapter": False,
            "tune_mm_mlp_adapter": False,
            "tune_entire_model": False,
        },
        "generation_config.json": {name: value for name, value in generation.items() if value != []},
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": _tokenizer_config(source, tokenizer) | {"model_max_length": max_length},
        f"{TOWER_DIRECTORY}/config.json": tower_config,
        f"{TOWER_DIRECTORY}/preprocessor_config.json": {
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
            "image_mean": list(images.image_mean),
            "image_std": list(images.image_std),
        },
    }
    return ExportedCheckpoint(files, tensors)


def _unsupported_settings(config: FlorenceVLConfig, processor: FlorenceVLProcessor) -> list[str]:
    """Describe the settings of fusion, prompts, projector and images that the original's code does not have."""
    settings = {
        "quantization_config": None,
        **vars(config),
        "do_center_crop": bool(processor.image_processor.do_center_crop),
    }
    unsupported = [
        f"{name} {settings[name]!r} (only {supported!r})"
        for name, supported in SUPPORTED_SETTINGS.items()
        if settings[name] != supported
    ]
    for name in config.fusion_prompts:
        if config.prompt_token_ids[name] != DEFAULT_PROMPT_TOKEN_IDS.get(name):
            unsupported.append(f"the prompt {name!r}, {config.prompts[name]!r}")
    return unsupported


def _original_tokenizer(tokenizer: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """
    Return a tokenizer.json without the tokens that conversion added, in a form that tokenizers 0.19 reads, and the
    number of its token ids.
    """
    model = tokenizer["model"]
    vocabulary = model["vocab"]  # a list in Unigram models, else ids by token
    ids = set(vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary)))
    added = [token for token in tokenizer["added_tokens"] if token["content"] != UNUSED_ROW.format(token["id"])]
    last_id = max(ids | {token["id"] for token in added})
    # An `<image>` followed by other tokens is the original's own.
    added = [token for token in added if (token["content"], token["id"]) != (IMAGE_TOKEN, last_id)]
    if model.get("merges"):
        # Since 0.20 a merge is a pair. Earlier versions only read its two parts joined by a space.
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        model = model | {"merges": merges}
    num_tokens = 1 + max(ids | {token["id"] for token in added})
    return tokenizer | {"added_tokens": added, "model": model}, num_tokens


def _tokenizer_config(source: Path, tokenizer: dict[str, Any]) -> dict[str, Any]:
    saved = read_json(source / "tokenizer_config.json")
    added, extra = [token["content"] for token in tokenizer["added_tokens"]], saved.get("extra_special_tokens") or []
    return {
        # Reads tokenizer.json alone. With any other class, `use_fast=False` in the original requires tokenizer.model.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "additional_special_tokens": [token for token in added if token in extra],
        **{name: saved[name] for name in TOKENIZER_SETTINGS if saved.get(name) is not None},
    }


def _original_tensors(
    config: FlorenceVLConfig, stored: dict[str, LazyTensor], num_tokens: int
) -> dict[str, LazyTensor]:
    """Map every tensor of the model to its names in the original, and refuse what does not match."""
    shapes = tensor_shapes(config)
    unknown = [str(tensor) for name, tensor in stored.items() if name not in shapes]
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    check_all_paired(unknown, [name for name in shapes if name not in stored])
    # If the original had a token for each row, conversion added rows of zeros, from `<image>` on.
    has_added_rows = config.image_token_id == num_tokens and not stored[EMBEDDING_TABLES[0]].load()[num_tokens:].any()
    tensors = {}
    for name, shape in shapes.items():
        tensor = stored[name]
        if tensor.shape != shape:
            raise CheckpointError(f"{tensor} has shape {tensor.shape}, but {shape} follows from config.json.")
        tensor = tensor.with_rows(num_tokens) if name in EMBEDDING_TABLES and has_added_rows else tensor
        for original in to_original(name):
            if original.name is not None and not original.alias:
                tensors[original.name] = tensor.transposed() if original.transposed else tensor
    return tensors


def _decoder_tensors(bart: BartConfig, tower: dict[str, LazyTensor], dtype: torch.dtype) -> dict[str, LazyTensor]:
    """Return the tensors of a Florence-2 that only its decoder uses, by the original's names."""
    decoder, bias = "language_model.model.decoder.", "language_model.final_logits_bias"
    with torch.device("meta"):
        state_dict = BartDecoder(bart).state_dict()
    shapes = {decoder + name: tuple(tensor.shape) for name, tensor in state_dict.items() if "embed_tokens" not in name}
    check_all_paired([], [name for name in shapes if name not in tower])
    for name, shape in shapes.items():
        if tower[name].shape != shape:
            raise CheckpointError(
                f"{tower[name]} has shape {tower[name].shape}, expected {shape}; give a Florence-2 of the same size "
                f"as --vision-tower."
            )
    # Transformers' own Florence-2 does not store the bias, which is zero.
    return {ORIGINAL_TOWER + name: tower[name].to(dtype) for name in (*shapes, bias) if name in tower}


__all__ = ["ExportedCheckpoint", "export", "read_as_original"]
