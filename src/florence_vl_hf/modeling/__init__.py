# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""The network and its configuration."""

from .configuration_florence_vl import FlorenceVLConfig
from .modeling_florence_vl import FlorenceVLForConditionalGeneration, FlorenceVLModel, FlorenceVLPreTrainedModel


__all__ = ["FlorenceVLConfig", "FlorenceVLForConditionalGeneration", "FlorenceVLModel", "FlorenceVLPreTrainedModel"]
