# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Options and arguments that several commands share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer


if TYPE_CHECKING:
    import torch


DtypeName = Literal["bfloat16", "float16", "float32"]

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Directory or Hub id of a converted, trained or original model.")
]
Output = Annotated[Path, typer.Argument(metavar="OUTPUT", help="Output directory. It must not exist, or be empty.")]
ImageFeatureSource = Annotated[
    list[str] | None,
    typer.Option(
        help="Override how the vision tower turns an image into tokens: one or more of spatial_avg_pool, "
        "temporal_avg_pool and last_frame, separated by commas."
    ),
]
MaxShardSize = Annotated[str, typer.Option(help="Maximum size of one file of weights, which is held in memory.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting of the recipe. Can be repeated."),
]
Device = Annotated[str, typer.Option(help="Device of the model, such as cpu, cuda or auto.")]


def split(values: list[str] | None) -> list[str] | None:
    """Return the values of an option that can be repeated, or given once with commas."""
    return [value for given in values or [] for value in given.replace(",", " ").split()] or None


def torch_dtype(name: DtypeName | None) -> "torch.dtype | None":
    import torch

    return None if name is None else getattr(torch, name)
