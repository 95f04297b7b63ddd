# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Jinja environments of model cards and HTML pages."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def template_environment(directory: Path, **options: Any) -> Environment:
    """Return the environment of the templates in a directory, where a name that is not given is an error."""
    return Environment(
        loader=FileSystemLoader(directory), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, **options
    )


__all__ = ["template_environment"]
