# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Chat templates of the original, one `.jinja` file each, adapted to a tokenizer."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase


# As remote code this module is copied without the templates, which then cannot be chosen by name.
TEMPLATE_FILES = Path(__file__).parent / "chat_template_files"
CHAT_TEMPLATES = tuple(sorted(path.stem for path in TEMPLATE_FILES.glob("*.jinja")))


def load_chat_template(name: str, tokenizer: PreTrainedTokenizerBase, image_token: str = "<image>") -> str:
    """
    Load a chat template and adapt it to a tokenizer, so that it gives the token ids that the original trained on.

    The original splits a prompt at its images and tokenizes each piece separately. A template, whose text is tokenized
    at once, must therefore contain the BOS that the tokenizer adds to the first piece, and the space that
    SentencePiece tokenizers add to the text of each piece.

    Args:
        name (`str`): One of `CHAT_TEMPLATES`.
        tokenizer (`PreTrainedTokenizerBase`): Tokenizer of the model, which has `image_token` as one token.
        image_token (`str`, *optional*, defaults to `"<image>"`): Placeholder of one image.

    Raises:
        ValueError: If there is no such template, or the tokenizer tokenizes text after an image in another way.
    """
    if not CHAT_TEMPLATES:
        raise ValueError(
            f"There is no chat template {name!r} here: the templates are part of the package florence_vl_hf. Install "
            f"it, or give the text of a template."
        )
    if name not in CHAT_TEMPLATES:
        raise ValueError(f"There is no chat template {name!r}; choose one of {', '.join(CHAT_TEMPLATES)}.")
    # Parity: in an empty assistant turn the original writes no end token, and these templates do.
    text = (TEMPLATE_FILES / f"{name}.jinja").read_text(encoding="utf-8")

    settings = ""
    if tokenizer.bos_token_id is not None and tokenizer("x").input_ids[:1] == [tokenizer.bos_token_id]:
        settings += "{%- set leading_bos = bos_token -%}\n"
        if after_bos := _space_after(tokenizer.bos_token, tokenizer, piece="A chat"):
            settings += f"{{%- set after_bos = {after_bos!r} -%}}\n"
    if after_image := _space_after(image_token, tokenizer, piece="\nWhat is this?"):
        settings += f"{{%- set after_image = {after_image!r} -%}}\n"
    return settings + text


def require_chat_template(processor: Any) -> None:
    """Raise a `ValueError` if a processor has no chat template."""
    if not processor.chat_template:
        raise ValueError("The processor has no chat template; convert the model again with a `chat_template`.")


def _space_after(special_token: str, tokenizer: PreTrainedTokenizerBase, piece: str) -> str:
    """Text to insert after a special token, so that `piece` after it has the same token ids as alone."""
    alone = tokenizer(piece, add_special_tokens=False).input_ids
    for candidate in ("", " "):
        if tokenizer(special_token + candidate + piece, add_special_tokens=False).input_ids[1:] == alone:
            return candidate
    raise ValueError(
        f"{type(tokenizer).__name__} tokenizes {piece!r} after {special_token!r} in another way than alone, with and "
        f"without a space between them; use a tokenizer that has {special_token!r} as one special token."
    )


__all__ = ["CHAT_TEMPLATES", "load_chat_template", "require_chat_template"]
