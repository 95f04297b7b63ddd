# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Commands of `training` and `planning`."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from .options import DtypeName, MaxShardSize, Output, Settings, torch_dtype


def check_data(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="Conversations: a .json, .jsonl or .parquet file, a directory of the library datasets, or a Hub id.",
        ),
    ],
    image_folder: Annotated[
        Path | None, typer.Option(help="Directory that image paths are relative to. By default, that of FILE.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Directory or Hub id of the model to train, whose tokenizer counts tokens.")
    ] = None,
    max_length: Annotated[int, typer.Option(help="Maximum number of tokens of a sample in training.", min=1)] = 2048,
    chat_template: Annotated[
        str | None, typer.Option(help="llama3, phi3, vicuna or plain. By default, that of the model.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Number of processes. By default, one per core.", min=0)] = None,
    split: Annotated[str, typer.Option(help="Split of a dataset that has several.")] = "train",
    show: Annotated[int, typer.Option(help="Number of samples to name for each kind of problem.", min=0)] = 5,
    report: Annotated[
        Path | None, typer.Option(help="Write every problem to this .jsonl file.", metavar="FILE.jsonl")
    ] = None,
) -> None:
    """Check all conversations and images before training. The exit code is 1 if there are problems."""
    from ..conversion import is_original, read_original
    from ..conversion.checkpoint_files import resolve_checkpoint
    from ..processing import FlorenceVLProcessor
    from ..training import check_data as checks
    from ..training import load_conversations

    if chat_template is not None and model is None:
        raise typer.BadParameter("It requires the tokenizer of a --model.", param_hint="--chat-template")
    processor = None
    if model is not None and is_original(model):
        processor = read_original(resolve_checkpoint(model)).processor
    elif model is not None:
        processor = FlorenceVLProcessor.from_pretrained(model)
    result = checks.check_data(
        load_conversations(file, image_folder, split),
        processor,
        max_length=max_length,
        chat_template=chat_template,
        num_workers=workers,
        num_examples=show,
        report_file=report,
    )
    typer.echo(checks.format_report(result))
    if not result.is_sound:
        raise typer.Exit(1)


def _list_settings(is_requested: bool) -> None:
    if is_requested:
        from ..training.arguments import describe_settings

        typer.echo(describe_settings())
        raise typer.Exit()


def train(
    recipe: Annotated[str, typer.Argument(help="YAML file of settings, or the name of a recipe of this package.")],
    changes: Settings = None,
    on_error: Annotated[
        Literal["skip", "raise"] | None,
        typer.Option(help="Skip and count broken samples, or stop at the first. Overrides `on_error` of the recipe."),
    ] = None,
    settings: Annotated[
        bool,
        typer.Option("--settings", callback=_list_settings, is_eager=True, help="List the settings of a recipe."),
    ] = False,
) -> None:
    """Train a model with a recipe, or resume an interrupted run."""
    import logging

    from ..training import read_recipe
    from ..training import train as train_model

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # One process of a distributed run is enough to log.
    if os.environ.get("RANK", "0") == "0":
        logging.getLogger("florence_vl_hf").setLevel(logging.INFO)
    overrides = {} if on_error is None else {"on_error": on_error}
    train_model(read_recipe(recipe, changes) | overrides)


def plan_memory(
    recipe: Annotated[
        str | None,
        typer.Argument(help="YAML file or name of a recipe. By default, a table of the paper's runs and of others."),
    ] = None,
    changes: Settings = None,
    accelerate_config: Annotated[Path | None, typer.Option(help="Configuration file of `accelerate launch`.")] = None,
    num_gpus: Annotated[int | None, typer.Option(help="Number of GPUs of all machines together.", min=1)] = None,
    sharding: Annotated[
        Literal["none", "ddp", "zero2", "zero3", "fsdp2"] | None,
        typer.Option(help="How GPUs share the model. Overrides the accelerate configuration."),
    ] = None,
    shape: Annotated[
        Literal["8b", "3b"] | None,
        typer.Option(help="Plan for the shape of a published model instead of the recipe's model."),
    ] = None,
    images_per_sample: Annotated[int, typer.Option(help="Number of images per sample.", min=0)] = 1,
) -> None:
    """Estimate the memory of training per GPU from the model's configuration."""
    from ..conversion import is_original, read_original
    from ..conversion.checkpoint_files import resolve_checkpoint
    from ..modeling import FlorenceVLConfig
    from ..planning import format_plan, format_table, plan_known_runs, published_config, read_setup
    from ..planning import plan_memory as plan
    from ..training import read_recipe

    if recipe is None:
        typer.echo(format_table(plan_known_runs()))
        return
    model, config_changes, setup = read_setup(
        read_recipe(recipe, changes), num_gpus, sharding, accelerate_config, images_per_sample
    )
    if shape is not None:
        config = published_config(shape)
    elif is_original(model):
        config = read_original(resolve_checkpoint(model)).config
    else:
        config = FlorenceVLConfig.from_pretrained(model)
    if config_changes:
        config = FlorenceVLConfig.from_dict({**config.to_dict(), **config_changes})
    typer.echo(format_plan(plan(config, setup)))


def merge(
    adapter: Annotated[str, typer.Argument(help="Directory or Hub id of a LoRA adapter that peft saved.")],
    output: Output,
    base: Annotated[
        str | None,
        typer.Option(
            help="Directory or Hub id of the adapter's base model, not quantized. By default, the one that the "
            "adapter names."
        ),
    ] = None,
    dtype: Annotated[DtypeName | None, typer.Option(help="By default, that of the base model.")] = None,
    max_shard_size: MaxShardSize = "1GB",
) -> None:
    """Merge an adapter into its base model, which then loads without peft."""
    from ..training import merge_adapter

    model = merge_adapter(adapter, output, base=base, dtype=torch_dtype(dtype), max_shard_size=max_shard_size)
    num_parameters = model.num_parameters() / 1e6
    typer.echo(f"Wrote {output}: {model.config.text_config.model_type}, {num_parameters:,.1f} million parameters.")
