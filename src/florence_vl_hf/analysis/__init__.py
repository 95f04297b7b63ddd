# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""What a model computes from an image: its features, and maps of them."""

from .extraction import ImageFeatures, VisionEncoder, extract_features, load_vision_encoder
from .feature_maps import feature_maps


__all__ = ["ImageFeatures", "VisionEncoder", "extract_features", "feature_maps", "load_vision_encoder"]
