# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Tokenizer and picture settings of an original checkpoint become a `FlorenceVLProcessor`."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import AutoTokenizer, LlavaImageProcessorPil, PreTrainedTokenizerBase

from ..processing import FlorenceVLProcessor, load_chat_template
from .errors import CheckpointError
from .original_config import TowerSettings
from .stored_tensors import read_json


IMAGE_TOKEN = "<image>"
# The name of a row before that of `<image>` which the original's tokenizer does not name.
UNUSED_ROW = "<|unused_row_{}|>"
# Rows of the embedding table come in multiples of this, which matrix kernels like.
ROW_MULTIPLE = 64

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


def load_original_tokenizer(folder: Path, tokenizer_class: type = AutoTokenizer) -> PreTrainedTokenizerBase:
    """
    Load the tokenizer of an original checkpoint, of a language model or of a vision tower.

    Args:
        tokenizer_class (`type`, *optional*, defaults to `AutoTokenizer`): What loads it.

    Raises:
        CheckpointError: If the folder holds none, or a damaged one.
    """
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not any(file.name in ("tokenizer.json", "tokenizer.model", "vocab.json") for file in files):
        raise CheckpointError(
            f"{folder} has no tokenizer.json and no tokenizer.model; fetch the tokenizer's files too."
        )
    # Apart from the checkpoint's config.json, whose model type Transformers does not know, and without its code.
    with tempfile.TemporaryDirectory() as apart:
        for file in files:
            shutil.copy(file, apart)
        settings_file = Path(apart) / "tokenizer_config.json"
        settings = read_json(settings_file) if settings_file.exists() else {}
        settings.pop("auto_map", None)
        if settings.get("tokenizer_class") == "LlamaTokenizer":
            # Parity: slow tokenizers of Transformers 4.43, which the original uses, take a missing `legacy` for true.
            settings.setdefault("legacy", True)
        settings_file.write_text(json.dumps(settings), encoding="utf-8")
        try:
            # Training padded on the right; in a batch that generates, answers must start where prompts end.
            tokenizer = tokenizer_class.from_pretrained(apart, padding_side="left")
        except Exception as error:
            # Whatever the tokenizer libraries say of damaged files, in one of their many exceptions.
            raise CheckpointError(f"The tokenizer in {folder} cannot be loaded ({error}); fetch it again.") from error
    tokenizer.name_or_path = ""
    return tokenizer


def add_image_token(tokenizer: PreTrainedTokenizerBase, num_rows: int) -> tuple[int, int]:
    """
    Give `<image>` a row of the embedding table that no text uses, and leave the id of every other token alone.

    A row that the table has but the tokenizer does not name is taken, the last one; the rows before it get names that
    no text contains. If every row has a name, new rows are added, up to a multiple of 64.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Is given the token.
        num_rows (`int`): Rows of the embedding table, `vocab_size` of the original's configuration.

    Returns:
        `tuple[int, int]`: The id of `<image>`, and the number of rows with it.
    """
    vocabulary = tokenizer.get_vocab()
    if IMAGE_TOKEN in vocabulary and vocabulary[IMAGE_TOKEN] < num_rows:
        return vocabulary[IMAGE_TOKEN], num_rows
    first_free = max(vocabulary.values()) + 1
    if first_free > num_rows:
        raise CheckpointError(
            f"The tokenizer names {first_free} tokens, but the language model has only {num_rows} rows; the two do "
            f"not belong together."
        )
    image_token_id = first_free
    if first_free < num_rows:
        image_token_id = num_rows - 1
        unused = [UNUSED_ROW.format(row) for row in range(first_free, image_token_id)]
        tokenizer.add_tokens([AddedToken(text, normalized=False, special=True) for text in unused])
    else:
        num_rows = -(-(num_rows + 1) // ROW_MULTIPLE) * ROW_MULTIPLE
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, normalized=False, special=True)])

    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) != image_token_id:
        raise CheckpointError(
            f"{IMAGE_TOKEN} should have id {image_token_id}, but the tokenizer gave it "
            f"{tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)}: its ids have gaps. Name the gaps in the tokenizer first."
        )
    return image_token_id, num_rows


def build_processor(
    tower: TowerSettings,
    tokenizer: PreTrainedTokenizerBase,
    num_image_tokens: int,
    do_pad: bool,
    chat_template: str,
) -> FlorenceVLProcessor:
    """
    Put a processor together from a tower's settings and a tokenizer that knows `<image>`.

    Args:
        do_pad (`bool`): Whether pictures are padded to squares, and not just resized.
        chat_template (`str`): One of `CHAT_TEMPLATES`.
    """
    size = {"height": tower.image_size, "width": tower.image_size}
    image_processor = LlavaImageProcessorPil(
        do_pad=do_pad,
        size=size,
        crop_size=size,
        do_center_crop=False,
        image_mean=tower.image_mean,
        image_std=tower.image_std,
    )
    return FlorenceVLProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        num_image_tokens=num_image_tokens,
        chat_template=load_chat_template(chat_template, tokenizer),
        image_token=IMAGE_TOKEN,
    )


def fitting_chat_template(original: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """The conversation format that a checkpoint was finetuned on, told by its language model and its tokens."""
    vocabulary = tokenizer.get_vocab()
    if original["model_type"].startswith("llava_phi") or "<|user|>" in vocabulary:
        return "phi3"
    return "llama3" if "<|start_header_id|>" in vocabulary else "vicuna"


__all__ = [
    "IMAGE_TOKEN",
    "UNUSED_ROW",
    "add_image_token",
    "build_processor",
    "fitting_chat_template",
    "load_original_tokenizer",
]
