# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""What a model computes from an image: maps of its features."""

from .feature_maps import feature_maps


__all__ = ["feature_maps"]
