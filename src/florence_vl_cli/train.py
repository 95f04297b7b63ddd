# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Commands of `training`."""

import logging
import os
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Argument, Option

from . import options


def check_data(
    file: Annotated[
        str, Argument(help="Conversations: a .json, .jsonl or .parquet file, a directory of `datasets`, or a Hub id.")
    ],
    image_folder: options.ImageFolder = None,
    model: Annotated[str | None, Option(help="Directory or Hub id of a model whose tokenizer counts tokens.")] = None,
    max_length: Annotated[int, Option(help="Maximum number of tokens of a sample in training.", min=1)] = 2048,
    chat_template: options.ChatTemplate = None,
    workers: Annotated[int | None, Option(help="Number of processes. By default, one per core.", min=0)] = None,
    split: options.Split = "train",
    show: Annotated[int, Option(help="Number of samples to name for each kind of problem.", min=0)] = 5,
    max_image_side: Annotated[
        int | None, Option(help="Longest side of an image, in pixels. By default, as in training.", min=1)
    ] = None,
    report: Annotated[Path | None, Option(help="Write every problem to this .jsonl file.")] = None,
) -> None:
    """Check all conversations and images before training. The exit code is 1 if there are problems."""
    from florence_vl_hf.conversion import load_processor
    from florence_vl_hf.training import check_data as checks
    from florence_vl_hf.training import load_conversations
    from florence_vl_hf.training.samples import MAX_IMAGE_SIDE

    if report is not None and report.exists() and Path(file).exists() and report.samefile(file):
        raise FileExistsError(
            f"{report} exists and is not a report, but the data; choose another file for the report."
        )
    if chat_template is not None and model is None:
        raise typer.BadParameter("It requires the tokenizer of a --model.", param_hint="--chat-template")
    result = checks.check_data(
        load_conversations(file, image_folder, split),
        None if model is None else load_processor(model),
        max_length=max_length,
        chat_template=chat_template,
        num_workers=workers,
        num_examples=show,
        max_image_side=max_image_side or MAX_IMAGE_SIDE,
        report_file=report,
    )
    typer.echo(checks.format_report(result))
    if not result.is_sound:
        raise typer.Exit(1)


def _list_settings(is_requested: bool) -> None:
    if is_requested:
        from florence_vl_hf.training.arguments import describe_settings

        typer.echo(describe_settings())
        raise typer.Exit()


def train(
    recipe: Annotated[str, Argument(help="YAML file of settings, or the name of a recipe of this package.")],
    changes: options.Settings = None,
    on_error: Annotated[
        Literal["skip", "raise"] | None,
        Option(help="Skip and count broken samples, or stop at the first. Overrides the recipe."),
    ] = None,
    settings: Annotated[
        bool, Option("--settings", callback=_list_settings, is_eager=True, help="List the settings of a recipe.")
    ] = False,
) -> None:
    """Train a model with a recipe, or resume an interrupted run."""
    from florence_vl_hf.training import read_recipe
    from florence_vl_hf.training import train as train_model

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # One process of a distributed run is enough to log.
    if os.environ.get("RANK", "0") == "0":
        logging.getLogger("florence_vl_hf").setLevel(logging.INFO)
    train_model(read_recipe(recipe, changes) | ({"on_error": on_error} if on_error else {}))


def merge(
    adapter: Annotated[str, Argument(help="Directory or Hub id of a LoRA adapter that peft saved.")],
    output: options.Output,
    base: Annotated[
        str | None,
        Option(help="Directory or Hub id of its base model, not quantized, if the adapter's has moved."),
    ] = None,
    dtype: options.Dtype = None,
    max_shard_size: options.ShardSize = "1GB",
) -> None:
    """Merge an adapter into its base model, which then loads without peft."""
    from florence_vl_hf.training import merge_adapter

    model = merge_adapter(adapter, output, base=base, dtype=options.torch_dtype(dtype), max_shard_size=max_shard_size)
    options.echo_written(output, model.config, model.num_parameters())
