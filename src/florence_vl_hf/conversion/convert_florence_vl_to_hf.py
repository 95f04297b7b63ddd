# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Conversion of an original Florence-VL checkpoint into a directory that the Auto classes load."""

from pathlib import Path

import torch

from ..model_cards import ConvertedCard, write_card
from .checkpoint_files import output_directory
from .original_checkpoint import ConvertedCheckpoint, read_original


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
    with output_directory(Path(output)) as directory:
        checkpoint = read_original(
            source,
            base=base,
            vision_tower=vision_tower,
            image_feature_source=image_feature_source,
            dtype=dtype,
            chat_template=chat_template,
        )
        checkpoint.save(directory, max_shard_size)
        card = ConvertedCard(
            name=Path(output).name,
            config=checkpoint.config,
            processor=checkpoint.processor,
            source=source,
            base=base,
            num_parameters=checkpoint.num_parameters,
            chat_template=checkpoint.chat_template,
            cast_to=None if dtype is None else str(dtype).removeprefix("torch."),
            num_added_rows=checkpoint.num_added_rows,
            num_unused=checkpoint.num_unused,
            assumptions=checkpoint.assumptions,
        )
        write_card(directory, card)
    return checkpoint
