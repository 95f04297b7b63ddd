# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Transformers' tests of a processor, on Florence-VL's."""

import tempfile
import unittest
from typing import Any

import pytest

from florence_vl_hf import FlorenceVLProcessor
from florence_vl_hf.conversion import convert

from ..conftest import FIXTURES, Golden
from .upstream.test_processing_common import ProcessorTesterMixin


pytestmark = pytest.mark.slow


class FlorenceVLProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = FlorenceVLProcessor

    @classmethod
    def setUpClass(cls) -> None:
        golden = Golden(FIXTURES / "llama-small")
        folder = cls.enterClassContext(tempfile.TemporaryDirectory())
        cls.model_id = f"{folder}/converted"
        convert(golden.checkpoint, cls.model_id, vision_tower=golden.vision_tower)
        # Saving copies the code of a class that is registered for an Auto class, as none of Transformers' own is, and
        # notes that in the processor itself, which then differs from the loaded one.
        cls.enterClassContext(pytest.MonkeyPatch.context()).setattr(FlorenceVLProcessor, "_auto_class", None)
        super().setUpClass()

    @staticmethod
    def prepare_processor_dict() -> dict[str, Any]:
        # Upstream's tests cut texts to about 100 tokens.
        return {"num_image_tokens": 2}
