# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""TEMP: names of the new module, until it is merged."""

from pathlib import Path

from .convert_florence_vl_to_hf import CHECKPOINT_FILES, resolve_folder
from .errors import CheckpointError
from .stored_tensors import find_tensors as read_tensors
from .stored_tensors import read_json


def resolve_checkpoint(path_or_id: str | Path) -> Path:
    return resolve_folder(path_or_id, CHECKPOINT_FILES)


__all__ = ["CheckpointError", "read_json", "read_tensors", "resolve_checkpoint"]
