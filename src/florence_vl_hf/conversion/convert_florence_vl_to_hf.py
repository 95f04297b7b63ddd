# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Conversion of an original Florence-VL checkpoint into a directory that the Auto classes load."""

from pathlib import Path

import torch
from transformers.utils import logging

from ..model_cards import ConvertedCard, public_name, write_card
from .checkpoint_files import output_directory, resolve_checkpoint
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
        given = {source_directory: source}
        given |= {base_directory: base} if base_directory and base else {}
        given |= {tower_directory: vision_tower} if tower_directory and vision_tower else {}
        card = ConvertedCard(
            name=output.name,
            config=checkpoint.config,
            processor=checkpoint.processor,
            source=source,
            base=base,
            num_parameters=checkpoint.num_parameters,
            chat_template=checkpoint.chat_template,
            cast_to=None if dtype is None else str(dtype).removeprefix("torch."),
            num_added_rows=checkpoint.num_added_rows,
            num_unused=len(checkpoint.unused),
            assumptions=[
                describe_assumption(a, lambda path: _public_path(path, given)) for a in checkpoint.assumptions
            ],
        )
        write_card(directory, card)
    return checkpoint


def _public_path(path: Path, given: dict[Path, str | Path]) -> str:
    """Replace the directory of a checkpoint by its public name: cards do not show local paths."""
    for directory, name in given.items():
        if path.is_relative_to(directory):
            return Path(public_name(name), path.relative_to(directory)).as_posix()
    return path.name
