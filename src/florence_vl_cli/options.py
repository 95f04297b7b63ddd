# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Arguments and options that several commands share, and the line that says what was written."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from typer import Argument, Option


if TYPE_CHECKING:
    import torch
    from transformers.utils.quantization_config import QuantizationConfigMixin

    from florence_vl_hf.modeling import FlorenceVLConfig


def split(values: list[str] | None) -> list[str] | None:
    """Return the values of an option that can be repeated, or given once with commas."""
    return [value for given in values or [] for value in given.replace(",", " ").split()] or None


Model = Annotated[str, Argument(help="Directory or Hub id of a converted, trained or original model.")]
Output = Annotated[Path, Argument(help="Output directory. It must not exist, or be empty.")]
FeatureSource = Annotated[
    list[str] | None,
    Option(
        callback=split,
        help="Override how the vision tower turns an image into tokens: one or more of spatial_avg_pool, "
        "temporal_avg_pool and last_frame, separated by commas.",
    ),
]
ChatTemplate = Annotated[str | None, Option(help="llama3, phi3, vicuna or plain. By default, the model's.")]
Dtype = Annotated[
    Literal["bfloat16", "float16", "float32"] | None,
    Option(help="Dtype of the weights. If omitted, that of the given model."),
]
ShardSize = Annotated[str, Option(help="Maximum size of one file of weights, which is held in memory.")]
Settings = Annotated[
    list[str] | None, Option("--set", metavar="KEY=VALUE", help="Override a setting of the recipe. Can be repeated.")
]
Device = Annotated[str, Option(help="Device of the model, such as cpu, cuda or auto.")]
Samples = Annotated[
    str,
    Argument(
        metavar="FILE",
        help="Conversations: a .json, .jsonl or .parquet file, a directory of `datasets`, or a Hub id. The last "
        "answer, or the list `answers`, is the reference.",
    ),
]
ServedModel = Annotated[
    str, Argument(help="Directory or Hub id of a converted, trained or original model; with --server, its name there.")
]
Question = Annotated[str | None, Option(help="Ask this about each image of FILE, which is a directory then.")]
ImageFolder = Annotated[Path | None, Option(help="Directory of relative image paths; by default, FILE's.")]
Split = Annotated[str, Option(help="Split of a dataset that has several.")]
Server = Annotated[
    str | None,
    Option(metavar="URL", help="Send the samples to a server with OpenAI's API, such as http://localhost:8000/v1."),
]
MaxNewTokens = Annotated[int, Option(help="Maximum number of tokens of an answer.", min=1)]
BatchSize = Annotated[int, Option(help="Number of samples per batch, or of requests at the same time.", min=1)]
LoadIn4bit = Annotated[
    bool, Option("--load-in-4bit", help="Quantize the language model to 4 bits, with bitsandbytes.")
]
LoadIn8bit = Annotated[
    bool, Option("--load-in-8bit", help="Quantize the language model to 8 bits, with bitsandbytes.")
]


Prompt = Annotated[
    list[str] | None,
    Option(metavar='NAME="TEXT"', help="Add a prompt or override caption, ocr or grounding. Can be repeated."),
]


def parse_prompts(values: list[str] | None) -> dict[str, str]:
    """Return the prompts of the option `Prompt` by name."""
    prompts = {}
    for given in values or []:
        name, _, text = (part.strip() for part in given.partition("="))
        if not (name and text):
            raise typer.BadParameter(f'{given!r} is not NAME="TEXT".', param_hint="--prompt")
        prompts[name] = text
    return prompts


def torch_dtype(name: str | None) -> "torch.dtype | None":
    import torch

    return None if name is None else getattr(torch, name)


def echo_once(message: str) -> None:
    """Print a message in one process of a distributed run."""
    if os.environ.get("RANK", "0") == "0":
        typer.echo(message)


def quantization(load_in_4bit: bool, load_in_8bit: bool) -> "QuantizationConfigMixin | None":
    """Return the `quantization_config` of the options `LoadIn4bit` and `LoadIn8bit`, for `load_pretrained`."""
    if load_in_4bit and load_in_8bit:
        raise typer.BadParameter("got both; choose one.", param_hint="--load-in-4bit, --load-in-8bit")
    if not load_in_4bit and not load_in_8bit:
        return None
    from florence_vl_hf.quantization import quantization_config

    return quantization_config(4 if load_in_4bit else 8)


def echo_written(output: Path, config: "FlorenceVLConfig", num_parameters: int) -> None:
    typer.echo(
        f"Wrote {output}: {config.text_config.model_type}, {num_parameters / 1e6:,.1f} million parameters, "
        f"{config.fusion_strategy} fusion of {', '.join(config.fusion_features or [])}, "
        f"{config.num_image_tokens} tokens per image of {config.image_size} x {config.image_size}."
    )
