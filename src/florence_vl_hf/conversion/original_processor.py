# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Translation of an original checkpoint's tokenizer and image settings into a `FlorenceVLProcessor`."""

import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template  # knows `{% generation %}`

from ..processing import IMAGE_TOKEN, FlorenceVLProcessor
from .checkpoint_files import CheckpointError, read_json


# Speakers in the original's conversations, and roles of messages.
LLAVA_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
# Name of a row of the embedding table before that of `<image>` which the original's tokenizer does not name.
UNUSED_ROW = "<|unused_row_{}|>"
# More rows without a token than any published language model has.
MAX_UNNAMED_ROWS = 2**14
# In pixels, far larger than of any model.
MAX_IMAGE_SIZE = 4096
# The vocabulary size is rounded up to a multiple of this, which matrix kernels prefer.
ROW_MULTIPLE = 64

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)


def load_original_tokenizer(
    directory: Path, tokenizer_class: type[AutoTokenizer] | type[PreTrainedTokenizerBase] = AutoTokenizer
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of an original checkpoint, of a language model or of a vision tower."""
    files = [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]
    if not any(file.name in ("tokenizer.json", "tokenizer.model", "vocab.json") for file in files):
        raise CheckpointError(f"{directory} has no tokenizer.json and no tokenizer.model; download them too.")
    if empty := [file for file in files if not file.stat().st_size]:
        raise CheckpointError(f"{empty[0]} is empty; download it again.")
    _check_patterns(directory / "tokenizer.json")
    # Apart from the checkpoint's config.json, whose model type Transformers does not know, and without its code.
    with tempfile.TemporaryDirectory() as temporary:
        for file in files:
            shutil.copy(file, temporary)
        settings_file = Path(temporary) / "tokenizer_config.json"
        settings = read_json(directory / settings_file.name) if settings_file.exists() else {}
        settings.pop("auto_map", None)
        if settings.get("tokenizer_class") == "LlamaTokenizer":
            # Parity: in Transformers 4.43, which the original uses, `legacy` of slow tokenizers is true by default.
            settings.setdefault("legacy", True)
        settings_file.write_text(json.dumps(settings), encoding="utf-8")
        try:
            # The original trains with padding on the right, but batched generation requires it on the left.
            tokenizer = tokenizer_class.from_pretrained(temporary, padding_side="left")
        except Exception as error:
            # The tokenizer libraries raise many exceptions for damaged files.
            raise CheckpointError(
                f"The tokenizer in {directory} cannot be loaded ({error}); download its files again."
            ) from error
    tokenizer.name_or_path = ""
    return tokenizer


def read_processor(path_or_id: str | Path, **hub_kwargs: Any) -> FlorenceVLProcessor:
    """Load the processor of a model in this package's layout."""
    _check_patterns(Path(path_or_id) / "tokenizer.json")
    try:
        processor = FlorenceVLProcessor.from_pretrained(path_or_id, **hub_kwargs)
        _check_image_processor(processor.image_processor)
        templates = processor.chat_template or {}
        for template in templates.values() if isinstance(templates, dict) else [templates]:
            _compile_jinja_template(template)
        return processor
    except Exception as error:
        # Tokenizers and image processors raise many exceptions for damaged files.
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"The processor in {path_or_id} cannot be loaded ({reason}); save it again.") from error


def _check_image_processor(image_processor: Any) -> None:
    """Process a small image, since Transformers reads settings of wrong types without an error."""
    size = dict(image_processor.size)
    if max(size.values()) > MAX_IMAGE_SIZE:
        raise ValueError(f"images of size {size}, expected at most {MAX_IMAGE_SIZE} pixels")
    pixel_values = image_processor(Image.new("RGB", (2, 2)), return_tensors="pt").pixel_values
    if pixel_values.shape[:2] != (1, 3) or not pixel_values.isfinite().all():
        raise ValueError(f"pixel values of shape {tuple(pixel_values.shape)}, or not finite")


def _check_patterns(file: Path) -> None:
    """
    Refuse regular expressions that repeat a group, as no published tokenizer has. Their time can grow exponentially
    with the length of a text, which ends the tokenizers library with a panic.
    """
    tokenizer = read_json(file) if file.is_file() else {}
    parts = [tokenizer.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")]
    for pattern in re.findall(r'"Regex": ("(?:[^"\\]|\\.)*")', json.dumps(parts)):
        # Without what an escape or a character class contains.
        syntax = re.sub(r"\[[^\]]*\]", "", re.sub(r"\\.", "", json.loads(pattern)))
        if re.search(r"\)[*+{]", syntax):
            raise CheckpointError(f"{file} has the regular expression {pattern}, which repeats a group; correct it.")


def add_image_token(tokenizer: PreTrainedTokenizerBase, num_rows: int) -> tuple[int, int]:
    """
    Give `<image>` a row of the embedding table that no text uses, without changing the id of any other token.

    If the table, of `num_rows` rows, has rows that the tokenizer does not name, `<image>` takes the last one, and the
    rows before it get names that no text contains. Otherwise rows are added, up to a multiple of 64.

    Returns:
        `tuple[int, int]`: The id of `<image>`, and the new number of rows.
    """
    vocabulary = tokenizer.get_vocab()
    if IMAGE_TOKEN in vocabulary and vocabulary[IMAGE_TOKEN] < num_rows:
        return vocabulary[IMAGE_TOKEN], num_rows
    first_free = max(vocabulary.values(), default=-1) + 1
    if not first_free <= num_rows <= first_free + MAX_UNNAMED_ROWS:
        raise CheckpointError(
            f"The tokenizer has {first_free} tokens, but the language model's vocabulary size is {num_rows}; give the "
            f"files of one model."
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
            f"The ids of the tokenizer have gaps; add tokens before {image_token_id} for them first."
        )
    return image_token_id, num_rows


def detect_chat_template(model_type: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the name of the chat template that an original was finetuned with, detected from its language model."""
    vocabulary = tokenizer.get_vocab()
    if model_type.startswith("llava_phi") or "<|user|>" in vocabulary:
        return "phi3"
    return "llama3" if "<|start_header_id|>" in vocabulary else "vicuna"
