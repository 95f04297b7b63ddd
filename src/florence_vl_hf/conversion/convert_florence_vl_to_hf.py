# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Conversion of an original Florence-VL checkpoint into a directory that the Auto classes load."""

from pathlib import Path

import torch
from transformers.utils import logging

from .checkpoint_files import output_directory, resolve_checkpoint
from .model_card import write_model_card
from .original_checkpoint import ConvertedCheckpoint, read_original
from .original_config import describe_assumption


logger = logging.get_logger(__name__)

# Files of a Florence-2 that are downloaded where the checkpoint has the weights.
TOWER_CONFIG_FILES = ("config.json", "preprocessor_config.json", "processor_config.json")


def convert(
    source: str | Path,
    output: str | Path,
    vision_tower: str | Path | None = None,
    image_feature_source: list[str] | None = None,
    dtype: torch.dtype | None = None,
    chat_template: str | None = None,
    max_shard_size: int | str = "1GB",
    base: str | Path | None = None,
) -> ConvertedCheckpoint:
    """
    Convert an original Florence-VL checkpoint into a directory that the Auto classes load.

    Args:
        source (`str` or `Path`): Directory or Hub id of the original checkpoint, such as `jiuhai/florence-vl-8b-sft`.
        output (`str` or `Path`): Output directory. It appears when it is complete.
        vision_tower (`str` or `Path`, *optional*): Directory or Hub id of a Florence-2, if `source` has none.
        image_feature_source (`list[str]`, *optional*): Overrides the tower's configuration.
        dtype (`torch.dtype`, *optional*): Dtype of the converted weights. By default each tensor keeps its own.
        chat_template (`str`, *optional*): One of `CHAT_TEMPLATES`. By default, detected from the language model.
        max_shard_size (`int` or `str`, *optional*, defaults to `"1GB"`): Maximum size of a file of weights. One file
            at a time is held in memory.
        base (`str` or `Path`, *optional*): For an adapter (a projector alone, or LoRA): directory or Hub id of its
            base model, in the original's layout or in this package's.

    Returns:
        `ConvertedCheckpoint`: What was written, with what had to be assumed.

    Raises:
        CheckpointError: If the checkpoint cannot be converted. Nothing is written then.
    """
    output = Path(output)
    with output_directory(output) as directory:
        source_directory = resolve_checkpoint(source)
        base_directory = None if base is None else resolve_checkpoint(base)
        tower_directory = None if vision_tower is None else resolve_checkpoint(vision_tower, TOWER_CONFIG_FILES)
        checkpoint = read_original(
            source_directory,
            base=base_directory,
            vision_tower=tower_directory,
            image_feature_source=image_feature_source,
            dtype=dtype,
            chat_template=chat_template,
        )
        for assumption in checkpoint.assumptions:
            logger.warning(describe_assumption(assumption))
        checkpoint.save(directory, max_shard_size)
        read_from = {source_directory: source}
        read_from |= {base_directory: base} if base_directory and base else {}
        read_from |= {tower_directory: vision_tower} if tower_directory and vision_tower else {}
        write_model_card(directory, checkpoint, source, output.name, read_from, base)
    return checkpoint
