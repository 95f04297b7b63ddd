# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""The texts of model cards, and how a card is made of one."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader

from ..processing import FlorenceVLProcessor, load_chat_template


CARD_FILE = "README.md"


def write_card(folder: Path, template: str, metadata: ModelCardData, **facts: Any) -> None:
    """
    Write the card of a model into its folder.

    Args:
        folder (`Path`): Folder of the model.
        template (`str`): Name of one of the templates beside this file.
        metadata (`ModelCardData`): What the Hub reads.
        facts: What the template tells.
    """
    # Markdown, not HTML: nothing is escaped.
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=False)
    ModelCard(templates.get_template(template).render(card_data=metadata.to_yaml(), **facts)).save(folder / CARD_FILE)


def is_plain(processor: FlorenceVLProcessor) -> bool:
    """Whether a model is shown pictures alone, to describe them, and not conversations."""
    plain = load_chat_template("plain", processor.tokenizer, processor.image_token)
    return processor.chat_template == plain


def public_name(path_or_id: str | Path) -> str:
    """What a card calls a model or its data: an id, or a folder's name, for where it lies concerns nobody."""
    return Path(path_or_id).name if Path(path_or_id).exists() else str(path_or_id)


__all__ = ["CARD_FILE", "is_plain", "public_name", "write_card"]
