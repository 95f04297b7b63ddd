# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Model cards: typed facts in, a rendered `README.md` out."""

from .cards import (
    CARD_FILE,
    Card,
    ConvertedCard,
    MergedCard,
    TrainedCard,
    Training,
    hub_id,
    public_name,
    read_metadata,
    read_training,
    write_card,
)


__all__ = [
    "CARD_FILE",
    "Card",
    "ConvertedCard",
    "MergedCard",
    "TrainedCard",
    "Training",
    "hub_id",
    "public_name",
    "read_metadata",
    "read_training",
    "write_card",
]
