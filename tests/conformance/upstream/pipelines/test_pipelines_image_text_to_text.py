# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Not in the sdist. What `PipelineTesterMixin` runs for the task, as upstream's class of this name does."""

import unittest
from typing import Any
from unittest.mock import ANY

from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.pipelines import ImageTextToTextPipeline

from ..utils.fetch_hub_objects_for_ci import IMAGE


class ImageTextToTextPipelineTests(unittest.TestCase):
    def get_test_pipeline(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        processor: ProcessorMixin,
        image_processor: Any = None,
        dtype: str = "float32",
    ) -> tuple[ImageTextToTextPipeline, list[dict[str, Any]]]:
        # As `transformers.pipeline` does, which leaves tokenizer and image processor to the processor.
        pipeline = ImageTextToTextPipeline(model=model, processor=processor, dtype=dtype, max_new_tokens=10)
        image_token = processor.tokenizer.image_token
        examples = [
            {"images": str(IMAGE), "text": f"{image_token}This is a "},
            {"images": [str(IMAGE)] * 2, "text": f"{image_token}{image_token}Here I see a "},
        ]
        return pipeline, examples

    def run_pipeline_test(self, pipeline: ImageTextToTextPipeline, examples: list[dict[str, Any]]) -> None:
        for example in examples:
            outputs = pipeline(**example)
            self.assertEqual(outputs, [{"input_text": example["text"], "generated_text": ANY}])
