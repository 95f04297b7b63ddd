# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""TEMP: the old modules under the new interface."""

from .assemble_florence_vl import assemble
from .conversion_plan import ConversionPlan
from .convert_florence_vl_to_hf import convert, plan_conversion
from .direct_loading import is_original
from .errors import CheckpointError
from .export_florence_vl_to_original import export
from .original_checkpoint import read_original
from .remote_code import write_remote_code
from .verification import verify


ConvertedCheckpoint = ConversionPlan


def load_pretrained(path_or_id, **kwargs):
    from ..modeling import FlorenceVLForConditionalGeneration
    from ..processing import FlorenceVLProcessor

    model = FlorenceVLForConditionalGeneration.from_pretrained(path_or_id, **kwargs)
    return model, FlorenceVLProcessor.from_pretrained(path_or_id)


__all__ = [
    "CheckpointError",
    "ConversionPlan",
    "ConvertedCheckpoint",
    "assemble",
    "convert",
    "export",
    "is_original",
    "load_pretrained",
    "plan_conversion",
    "read_original",
    "verify",
    "write_remote_code",
]
