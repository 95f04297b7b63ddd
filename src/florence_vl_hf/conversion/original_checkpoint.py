# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""TEMP: names of the new module, until it is merged."""

from .convert_florence_vl_to_hf import plan_conversion as read_original
from .convert_florence_vl_to_hf import tensor_shapes


__all__ = ["read_original", "tensor_shapes"]
