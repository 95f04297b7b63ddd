# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Original checkpoints become folders that Transformers loads, and back; new models are put together from parts."""

from .assemble_florence_vl import assemble
from .conversion_plan import ConversionPlan
from .convert_florence_vl_to_hf import convert, plan_conversion
from .errors import CheckpointError
from .export_florence_vl_to_original import export
from .hub import push
from .remote_code import write_remote_code
from .verification import verify


__all__ = [
    "CheckpointError",
    "ConversionPlan",
    "assemble",
    "convert",
    "export",
    "plan_conversion",
    "push",
    "verify",
    "write_remote_code",
]
