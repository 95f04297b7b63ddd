# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Command of `analysis` that compares features with text."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from . import options


def align(
    pairs: Annotated[
        Path,
        Argument(
            metavar="PAIRS",
            help="A .json or .jsonl file of objects with `image` and `caption`, or samples in LLaVA's format, whose "
            "last answer is the caption.",
        ),
    ],
    model: Annotated[str, Option(help="Directory or Hub id of a Florence-VL, or of a Florence-2.")],
    output: Annotated[Path, Option(help="Directory of alignment.json, alignment.md and curves.png.")],
    llm: Annotated[
        str | None, Option(help="Directory or Hub id of the language model. By default, that of the model.")
    ] = None,
    encoder: Annotated[
        list[str] | None,
        Option(help="Directory or Hub id of a vision encoder to compare, such as a CLIP. Can be repeated."),
    ] = None,
    image_folder: Annotated[Path | None, Option(help="Directory of relative image paths; by default, PAIRS'.")] = None,
    cache: Annotated[
        Path | None, Option(help="Directory that keeps features for other runs. By default, OUTPUT.cache.")
    ] = None,
    batch_size: Annotated[int, Option(help="Number of images or captions per batch.", min=1)] = 8,
    dtype: options.Dtype = None,
    device: options.Device = "auto",
) -> None:
    """Measure how well visual features fit a language model's states of captions. The same command resumes."""
    if find_spec("matplotlib") is None:
        raise ImportError("`align` requires more packages: pip install 'florence_vl_hf[analysis]'")
    from florence_vl_hf import analysis
    from florence_vl_hf.analysis.alignment_files import read_pairs, write_alignment
    from florence_vl_hf.conversion.checkpoint_files import output_directory

    with output_directory(output) as directory:
        alignment = analysis.align(
            read_pairs(pairs, image_folder),
            model,
            cache or output.with_name(f"{output.name}.cache"),
            llm=llm,
            encoders=encoder or [],
            batch_size=batch_size,
            dtype=options.torch_dtype(dtype),
            device=device,
        )
        write_alignment(alignment, directory)
    typer.echo(
        f"Wrote {output}: {alignment['settings']['num_pairs']:,} pairs, {len(alignment['errors']):,} images with an "
        f"error."
    )
