# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Transformers' tests of a model, on Florence-VL."""

import unittest
from typing import Any

import pytest
import torch

from florence_vl_hf import FlorenceVLConfig, FlorenceVLForConditionalGeneration, FlorenceVLModel

from ..conftest import tiny_config
from .upstream import test_tensor_parallel_mixin
from .upstream.generation.test_utils import GenerationTesterMixin
from .upstream.test_configuration_common import ConfigTester
from .upstream.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor
from .upstream.test_tensor_parallel_mixin import TensorParallelTesterMixin
from .upstream.test_training_mixin import TrainingTesterMixin


pytestmark = pytest.mark.slow


class FlorenceVLModelTester:
    """A tiny model and its inputs, and what upstream's mixins read about them."""

    base_model_class = FlorenceVLModel
    causal_lm_class = FlorenceVLForConditionalGeneration
    is_training = True
    batch_size = 3
    # Neither text of a test (ids below 20), nor lost when a test makes the vocabulary smaller by 15.
    image_token_id = 60

    def __init__(self) -> None:
        config = self.get_config()
        self.image_size = config.image_size
        self.seq_length = config.num_image_tokens + 7
        self.hidden_size = config.text_config.hidden_size
        self.num_hidden_layers = config.text_config.num_hidden_layers
        self.num_attention_heads = config.text_config.num_attention_heads

    def get_config(self) -> FlorenceVLConfig:
        return tiny_config(image_token_id=self.image_token_id)

    def prepare_config_and_inputs_for_common(self) -> tuple[FlorenceVLConfig, dict[str, torch.Tensor]]:
        config = self.get_config()
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.image_token_id)
        input_ids[input_ids == config.text_config.pad_token_id] = 1
        input_ids[:, : config.num_image_tokens] = self.image_token_id
        return config, {
            "pixel_values": floats_tensor([self.batch_size, 3, self.image_size, self.image_size]),
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
        }


class FlorenceVLForConditionalGenerationModelTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (FlorenceVLModel, FlorenceVLForConditionalGeneration)
    _is_composite = True

    def setUp(self) -> None:
        self.model_tester = FlorenceVLModelTester()
        self.config_tester = ConfigTester(
            self, config_class=FlorenceVLConfig, has_text_modality=False, common_properties=["image_token_id"]
        )

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    # Upstream counts one attention per layer. A block of DaViT has two, so Florence-2's test overrides the number too.
    def _image_features_get_expected_num_attentions(self, model_tester: Any = None) -> int:
        return 2 * sum(self.model_tester.get_config().vision_config.vision_config.depths)

    def _image_features_get_expected_num_hidden_states(self, model_tester: Any = None) -> int:
        return sum(self.model_tester.get_config().vision_config.vision_config.depths) + 1


class TrainingModelTester(FlorenceVLModelTester):
    def get_config(self) -> FlorenceVLConfig:
        config = super().get_config()
        # Upstream's test reads it here, where no configuration of a vision-language model has it.
        config.vocab_size = config.text_config.vocab_size
        return config


class FlorenceVLTrainingTest(TrainingTesterMixin, unittest.TestCase):
    model_tester = TrainingModelTester()


class FlorenceVLTensorParallelTest(TensorParallelTesterMixin, unittest.TestCase):
    all_model_classes = (FlorenceVLModel, FlorenceVLForConditionalGeneration)
    model_tester = FlorenceVLModelTester()

    @classmethod
    def setUpClass(cls) -> None:
        # Upstream runs them for a few of its models only.
        patch = pytest.MonkeyPatch.context()
        cls.enterClassContext(patch).setattr(test_tensor_parallel_mixin, "TP_DISTRIBUTED_TEST_MODEL_TYPES", None)
