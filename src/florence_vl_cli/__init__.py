# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `florence-vl`. Commands import torch and the rooms they use when they run: that takes seconds."""

import sys
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer import Option

from .ablate import ablate
from .align import align
from .chat import chat
from .convert import assemble, convert, export, verify
from .demo import demo
from .eval import evaluate
from .features import features
from .hub import push
from .predict import predict
from .serve import serve
from .train import check_data, merge, train


app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
commands = (
    *(convert, export, assemble, verify, check_data, train, merge, chat, predict, serve, demo),
    *(features, align, ablate, push),
)
for command in commands:
    app.command()(command)
app.command("eval")(evaluate)

# In characters. Of a longer message, the beginning and the end are printed.
MAX_MESSAGE_LENGTH = 1000
# Their messages say what is wrong; other types need their name to be understood.
CLEAR_ERRORS = (ImportError, OSError, RuntimeError, ValueError)


def _print_versions(is_requested: bool) -> None:
    if is_requested:
        typer.echo("\n".join(f"{name} {version(name)}" for name in ("florence_vl_hf", "transformers", "torch")))
        raise typer.Exit()


@app.callback()
def set_options(
    context: typer.Context,
    traceback: Annotated[bool, Option("--traceback", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, Option("--version", callback=_print_versions, is_eager=True, help="Show versions and exit.")
    ] = False,
) -> None:
    """Florence-VL for Hugging Face Transformers."""
    context.obj["traceback"] = traceback


def main(arguments: list[str] | None = None) -> None:
    """Run the command. An error is printed in one line, and the exit code is not 0."""
    options: dict[str, Any] = {"traceback": False}
    try:
        app(args=arguments, prog_name="florence-vl", obj=options)
    except Exception as error:
        if options["traceback"]:
            raise
        message = " ".join(str(error).split())
        if not message or not isinstance(error, CLEAR_ERRORS):
            message = f"{type(error).__name__}: {message}".removesuffix(": ")
        if len(message) > MAX_MESSAGE_LENGTH:  # a file's content can be part of it
            message = f"{message[: MAX_MESSAGE_LENGTH // 2]} [...] {message[-MAX_MESSAGE_LENGTH // 2 :]}"
        typer.echo(f"florence-vl: error: {message}", err=True)
        sys.exit(1)


__all__ = ["app", "main"]
