# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Transformers' tests of pipelines, on Florence-VL."""

import tempfile
import unittest

import pytest
import transformers
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from florence_vl_hf import FlorenceVLConfig, FlorenceVLForConditionalGeneration, FlorenceVLProcessor
from florence_vl_hf.conversion import convert

from ..conftest import FIXTURES, Golden
from .upstream import test_pipeline_mixin
from .upstream.pipelines.test_pipelines_image_text_to_text import ImageTextToTextPipelineTests
from .upstream.test_pipeline_mixin import PipelineTesterMixin


pytestmark = pytest.mark.slow


class FlorenceVLPipelineTest(PipelineTesterMixin, unittest.TestCase):
    pipeline_model_mapping = {"image-text-to-text": FlorenceVLForConditionalGeneration}

    @classmethod
    def setUpClass(cls) -> None:
        golden = Golden(FIXTURES / "llama-small")
        folder = cls.enterClassContext(tempfile.TemporaryDirectory())
        model_type, name = FlorenceVLConfig.model_type, FlorenceVLForConditionalGeneration.__name__
        convert(golden.checkpoint, f"{folder}/{model_type}/{name}", vision_tower=golden.vision_tower)
        # Upstream's tiny models are on the Hub, and their processors in Transformers, by name.
        patch = cls.enterClassContext(pytest.MonkeyPatch.context())
        patch.setattr(test_pipeline_mixin, "TRANSFORMERS_TINY_MODEL_PATH", folder)
        classes = {"tokenizer_classes": ["AutoTokenizer"], "processor_classes": []}
        patch.setitem(test_pipeline_mixin.tiny_model_summary, name, classes)
        patch.setitem(PROCESSOR_MAPPING_NAMES, model_type, FlorenceVLProcessor.__name__)
        patch.setattr(transformers, FlorenceVLProcessor.__name__, FlorenceVLProcessor, raising=False)
        tests = test_pipeline_mixin.pipeline_test_mapping["image-text-to-text"]
        if isinstance(tests["test"], str):  # in Transformers 5.19, a class
            name = ImageTextToTextPipelineTests.__name__
            patch.setitem(tests, "test", f"{ImageTextToTextPipelineTests.__module__}.{name}")
