# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Not in the sdist. In Transformers 5.19, `PipelineTesterMixin` imports the tests of all pipelines."""

import sys
from types import ModuleType


OTHER_PIPELINES = (
    *("any_to_any", "audio_classification", "automatic_speech_recognition", "depth_estimation"),
    *("document_question_answering", "feature_extraction", "fill_mask", "image_classification"),
    *("image_feature_extraction", "image_segmentation", "mask_generation", "object_detection"),
    *("table_question_answering", "text_classification", "text_generation", "text_to_audio", "token_classification"),
    *("video_classification", "zero_shot", "zero_shot_audio_classification", "zero_shot_image_classification"),
    "zero_shot_object_detection",
)
for name in OTHER_PIPELINES:
    module = ModuleType(f"{__name__}.test_pipelines_{name}")
    module.__file__ = __file__  # torch.compile reads it of every module
    module.__getattr__ = lambda class_name: type(class_name, (), {})
    sys.modules[module.__name__] = module
