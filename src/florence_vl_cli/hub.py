# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Command of `hub`."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option


def push(
    directory: Annotated[Path, Argument(help="Directory of a converted or trained model.")],
    repository: Annotated[str, Argument(help="Repository, as user/name. It is created if it does not exist.")],
    private: Annotated[bool, Option("--private", help="Require a private repository.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Check and list the files, but upload nothing.")] = False,
) -> None:
    """Upload a complete model to the Hub, without other files of its directory."""
    from florence_vl_hf.hub import push as push_model

    files = push_model(directory, repository, private=private, dry_run=dry_run)
    for name, size in files.items():
        typer.echo(f"{size:>15,}  {name}")
    done = "Nothing was uploaded" if dry_run else f"Uploaded to https://huggingface.co/{repository}"
    typer.echo(f"{len(files)} files, {sum(files.values()):,} bytes. {done}.")
