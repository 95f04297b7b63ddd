# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""The conversation formats of the original, one `.jinja` file each, and their fit to a tokenizer."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase


# Beside a converted model this module stands alone, without the folder: there are no formats by name then.
TEMPLATE_FILES = Path(__file__).parent / "chat_template_files"
CHAT_TEMPLATES = tuple(sorted(path.stem for path in TEMPLATE_FILES.glob("*.jinja")))


def load_chat_template(name: str, tokenizer: PreTrainedTokenizerBase, image_token: str = "<image>") -> str:
    """
    Read a conversation format and fit it to a tokenizer, so that it gives the token ids that the original trained on.

    The original cuts a prompt at its images and tokenizes each piece by itself. Two things follow, which a template
    must spell out because a whole prompt is tokenized at once: the BOS that the tokenizer puts before the first piece,
    and the space that SentencePiece tokenizers put before the text of each.

    Args:
        name (`str`): One of `CHAT_TEMPLATES`.
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer, which knows `image_token` as one token.

    Raises:
        ValueError: If there is no such format, or the tokenizer reads text after an image in some third way.
    """
    if not CHAT_TEMPLATES:
        raise ValueError(
            f"There is no chat template {name!r} here: the formats come with the package florence_vl_hf. Install it, "
            f"or give the text of a template."
        )
    if name not in CHAT_TEMPLATES:
        raise ValueError(f"There is no chat template {name!r}; choose one of {', '.join(CHAT_TEMPLATES)}.")
    text = (TEMPLATE_FILES / f"{name}.jinja").read_text(encoding="utf-8")

    settings = ""
    if tokenizer.bos_token_id is not None and tokenizer("x").input_ids[0] == tokenizer.bos_token_id:
        settings += "{%- set leading_bos = bos_token -%}\n"
        if after_bos := _space_after(tokenizer.bos_token, tokenizer, piece="A chat"):
            settings += f"{{%- set after_bos = {after_bos!r} -%}}\n"
    if after_image := _space_after(image_token, tokenizer, piece="\nWhat is this?"):
        settings += f"{{%- set after_image = {after_image!r} -%}}\n"
    return settings + text


def _space_after(special_token: str, tokenizer: PreTrainedTokenizerBase, piece: str) -> str:
    """What must stand between a special token and the text after it, for that text to read as if it stood alone."""
    alone = tokenizer(piece, add_special_tokens=False).input_ids
    for candidate in ("", " "):
        after_token = tokenizer(special_token + candidate + piece, add_special_tokens=False).input_ids[1:]
        if after_token == alone:
            return candidate
    raise ValueError(
        f"{type(tokenizer).__name__} reads text after {special_token!r} as {after_token}, alone as {alone}; no space "
        f"between them mends it. Use a tokenizer that knows {special_token!r} as one special token."
    )


__all__ = ["CHAT_TEMPLATES", "load_chat_template"]
