# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Command of `serving`."""

import io
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument

from .options import Device, LoadIn4bit, LoadIn8bit, MaxNewTokens, Model, quantization


if TYPE_CHECKING:
    from florence_vl_hf.serving import ChatSession

HELP = """\
/image PATH_OR_URL  add an image to your next question
/reset              forget all questions and images
/help               show these commands
/exit               leave, as does Ctrl-D; Ctrl-C stops an answer"""


def chat(
    model: Model,
    images: Annotated[list[str] | None, Argument(help="Images of the first question, as paths or URLs.")] = None,
    max_new_tokens: MaxNewTokens = 512,
    device: Device = "auto",
    load_in_4bit: LoadIn4bit = False,
    load_in_8bit: LoadIn8bit = False,
) -> None:
    """Chat about images. The commands /image, /reset, /help and /exit are explained at the start."""
    import torch

    from florence_vl_hf.conversion import load_pretrained
    from florence_vl_hf.serving import ChatSession, load_image

    # Before the model, which takes long to load.
    quantization_config = quantization(load_in_4bit, load_in_8bit)
    loaded = [load_image(image) for image in images or []]
    network, processor = load_pretrained(
        model, dtype="auto", device_map=device, quantization_config=quantization_config
    )
    network.generation_config.update(max_new_tokens=max_new_tokens, max_length=None)
    session = ChatSession(network.eval(), processor, loaded)
    with suppress(ImportError):  # not on Windows
        import readline  # noqa: F401, `input` then edits lines and recalls them
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    typer.echo(HELP)
    while (line := _read_line()) not in (None, "/exit"):
        try:
            _run(session, line or "")
        except KeyboardInterrupt:
            typer.echo("\nStopped.")
        except (ValueError, torch.OutOfMemoryError) as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)


def _read_line() -> str | None:
    """Return the next line of input without surrounding spaces, `None` at its end."""
    try:
        line = input("> ").strip()
    except EOFError:
        typer.echo()
        return None
    except KeyboardInterrupt:
        typer.echo("\nCtrl-D or /exit leaves the chat.")
        return ""
    if not sys.stdin.isatty():
        typer.echo(line)
    return line


def _run(session: "ChatSession", line: str) -> None:
    """Run a command, or answer a question."""
    from transformers import TextStreamer

    from florence_vl_hf.serving import DECODING

    command, _, argument = line.partition(" ")
    match command:
        case "":
            pass
        case "/image":
            session.add_image(os.path.expanduser(argument.strip().strip("'\"")))
            typer.echo("The image is part of your next question.")
        case "/reset":
            session.reset()
            typer.echo("All questions and images are forgotten.")
        case "/help":
            typer.echo(HELP)
        case _ if command[0] == "/" and command[1:].isalpha():
            typer.echo(f"error: there is no command {command}.\n{HELP}", err=True)
        case _:
            session.answer(line, TextStreamer(session.processor.tokenizer, skip_prompt=True, **DECODING))
