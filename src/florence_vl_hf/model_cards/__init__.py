# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""The texts of model cards, and how a card is made of one."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader


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


__all__ = ["CARD_FILE", "write_card"]
