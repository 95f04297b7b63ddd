# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Original checkpoints: loaded, converted, exported, verified, and new models assembled from their parts."""

from .assemble_florence_vl import assemble
from .checkpoint_files import CheckpointError
from .convert_florence_vl_to_hf import convert
from .export_florence_vl_to_original import export
from .load_original import (
    check_model_type,
    is_original,
    load_original,
    load_pretrained,
    load_processor,
)
from .original_checkpoint import ConvertedCheckpoint, read_original
from .verification import verify


__all__ = [
    "CheckpointError",
    "ConvertedCheckpoint",
    "assemble",
    "check_model_type",
    "convert",
    "export",
    "is_original",
    "load_original",
    "load_pretrained",
    "load_processor",
    "read_original",
    "verify",
]
