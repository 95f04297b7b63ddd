# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Command of `serving`."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from .options import Device, Model


def chat(
    model: Model,
    images: Annotated[list[Path] | None, Argument(help="Images to chat about.", exists=True, dir_okay=False)] = None,
    max_new_tokens: Annotated[int, Option(help="Maximum number of tokens of an answer.")] = 512,
    device: Device = "auto",
) -> None:
    """Chat about images. An empty line, /exit or the end of the input ends the chat."""
    from transformers import TextStreamer

    from florence_vl_hf.conversion import load_pretrained
    from florence_vl_hf.serving import ChatSession

    network, processor = load_pretrained(model, dtype="auto", device_map=device)
    network.generation_config.update(max_new_tokens=max_new_tokens, max_length=None)
    session = ChatSession(network.eval(), processor, [str(image) for image in images or []])
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    while question := _ask():
        session.answer(question, streamer)


def _ask() -> str:
    """Return the next line of input; empty at the end of the chat."""
    typer.echo("> ", nl=False)
    question = sys.stdin.readline().strip()
    if not sys.stdin.isatty():
        typer.echo(question)
    return "" if question == "/exit" else question
