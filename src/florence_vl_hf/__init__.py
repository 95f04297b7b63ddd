# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Florence-VL, native to Hugging Face Transformers. Importing this package registers it with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .modeling import (
    FlorenceVLConfig,
    FlorenceVLForConditionalGeneration,
    FlorenceVLModel,
    FlorenceVLPreTrainedModel,
)
from .processing import FlorenceVLProcessor


AutoConfig.register("florence_vl", FlorenceVLConfig)
AutoModel.register(FlorenceVLConfig, FlorenceVLModel)
AutoModelForImageTextToText.register(FlorenceVLConfig, FlorenceVLForConditionalGeneration)
AutoModelForMultimodalLM.register(FlorenceVLConfig, FlorenceVLForConditionalGeneration)
AutoProcessor.register(FlorenceVLConfig, FlorenceVLProcessor)

__all__ = [
    "FlorenceVLConfig",
    "FlorenceVLForConditionalGeneration",
    "FlorenceVLModel",
    "FlorenceVLPreTrainedModel",
    "FlorenceVLProcessor",
]
