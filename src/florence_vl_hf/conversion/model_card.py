# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""TEMP: fills a `ConvertedCard` from the old plan."""

from pathlib import Path

from ..model_cards import ConvertedCard, public_name, write_card
from .conversion_plan import ConversionPlan


def write_model_card(
    folder: Path,
    plan: ConversionPlan,
    source: str | Path,
    name: str,
    read_from: dict[Path, str | Path],
    base: str | Path | None = None,
) -> None:
    assumptions = plan.assumptions
    for place, stands_for in read_from.items():
        assumptions = [assumed.replace(str(place), public_name(stands_for)) for assumed in assumptions]
    words = plan.tensors["model.language_model.embed_tokens.weight"]
    is_cast = any(tensor.dtype != tensor.stored.dtype for tensor in plan.tensors.values())
    card = ConvertedCard(
        name=name,
        config=plan.config,
        processor=plan.processor,
        source=source,
        base=base,
        num_parameters=plan.num_parameters,
        chat_template=plan.chat_template or None,
        cast_to=str(plan.config.dtype).removeprefix("torch.") if is_cast else None,
        num_added_rows=words.shape[0] - words.stored.shape[0],
        num_unused=len(plan.unused),
        assumptions=assumptions,
    )
    write_card(folder, card)


__all__ = ["write_model_card"]
