# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""What a model computes from images: features, maps of them, how well they fit text, the attention of an answer."""

from .alignment import align, fit_linear_map, linear_cka, mutual_knn
from .attention import AnswerAttention, attend
from .extraction import ImageFeatures, VisionEncoder, extract_features, load_vision_encoder
from .feature_maps import feature_maps


__all__ = [
    "AnswerAttention",
    "ImageFeatures",
    "VisionEncoder",
    "align",
    "attend",
    "extract_features",
    "feature_maps",
    "fit_linear_map",
    "linear_cka",
    "load_vision_encoder",
    "mutual_knn",
]
