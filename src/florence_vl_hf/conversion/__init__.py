# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Original checkpoints become folders that Transformers loads."""

from .convert_florence_vl_to_hf import ConversionPlan, convert, plan_conversion
from .errors import CheckpointError


__all__ = ["CheckpointError", "ConversionPlan", "convert", "plan_conversion"]
