# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Command of `serving`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from .options import Device, Model


def chat(
    model: Model,
    images: Annotated[list[Path] | None, typer.Argument(help="Images to talk about.", metavar="IMAGE...")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of tokens of an answer.")] = 512,
    device: Device = "auto",
) -> None:
    """Chat about images. An empty line, /exit or the end of the input ends the chat."""
    from transformers import GenerationConfig, TextStreamer

    from ..conversion import load_pretrained
    from ..serving import ChatSession

    for image in images or []:
        if not image.is_file():
            raise typer.BadParameter(f"There is no image {image}.", param_hint="IMAGE...")
    network, processor = load_pretrained(model, dtype="auto", device_map=device)
    session = ChatSession(network.eval(), processor, [str(image) for image in images or []])
    generation_config = GenerationConfig.from_dict(network.generation_config.to_dict())
    generation_config.max_new_tokens = max_new_tokens
    generation_config.max_length = None
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    while question := _ask():
        session.answer(question, streamer, generation_config)


def _ask() -> str:
    """Return the next line of input; empty at the end of the chat."""
    typer.echo("> ", nl=False)
    question = sys.stdin.readline().strip()
    if not sys.stdin.isatty():
        typer.echo(question)
    return "" if question == "/exit" else question
