# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, MistralConfig

from florence_vl_hf import FlorenceVLConfig

from ..conftest import tiny_config


class TestDefaults:
    def test_defaults_are_those_of_the_published_8b(self):
        config = FlorenceVLConfig()
        assert config.num_image_tokens == 577
        assert config.fused_hidden_size == 4096
        assert config.text_config.hidden_size == 4096
        assert config.fusion_features == ["image", "caption", "ocr", "grounding"]

    def test_save_and_load_round_trip(self, tmp_path):
        config = tiny_config(fusion_features=["ocr", "image"], fusion_strategy="token", mask_prompt_padding=True)
        config.save_pretrained(tmp_path)
        loaded = AutoConfig.from_pretrained(tmp_path)
        loaded.name_or_path = ""
        assert loaded.to_dict() == config.to_dict()

    def test_supports_any_causal_language_model(self):
        config = tiny_config(text_config=MistralConfig(vocab_size=99, hidden_size=32))
        assert config.text_config.model_type == "mistral"
        assert config.get_text_config() is config.text_config

    def test_head_is_tied_if_the_text_config_ties_it(self):
        text_config = {**tiny_config().text_config.to_dict(), "tie_word_embeddings": True}
        assert tiny_config(text_config=text_config).tie_word_embeddings


class TestImageTokens:
    @pytest.mark.parametrize(
        ("changes", "num_image_tokens", "fused_hidden_size"),
        [
            ({}, 5, 48),
            ({"image_feature_source": ["temporal_avg_pool"]}, 4, 48),
            ({"image_feature_source": ["last_frame", "spatial_avg_pool", "temporal_avg_pool"]}, 9, 48),
            ({"fusion_strategy": "token"}, 15, 16),
            ({"fusion_strategy": "average"}, 5, 16),
            ({"fusion_features": ["image"]}, 5, 16),
            ({"fusion_strategy": "token", "fusion_features": ["caption", "ocr"]}, 10, 16),
            ({"image_size": 96}, 10, 48),
            ({"image_size": 100}, 17, 48),
        ],
    )
    def test_numbers_are_derived_from_the_configuration(self, changes, num_image_tokens, fused_hidden_size):
        config = tiny_config(**changes)
        assert (config.num_image_tokens, config.fused_hidden_size) == (num_image_tokens, fused_hidden_size)


class TestContradictions:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"fusion_features": ["image", "pose"]}, "give one or more of"),
            ({"fusion_features": []}, "give one or more of"),
            ({"fusion_features": ["image", "image"]}, "at most once"),
            ({"fusion_strategy": "sum"}, "fusion_strategy"),
            ({"image_feature_source": ["mean"]}, "spatial_avg_pool"),
            ({"image_feature_source": []}, "give at least one"),
            ({"image_size": 0}, "larger"),
            ({"image_size": 4096}, "smaller `image_size`"),
            ({"image_size": 192}, "32 positions"),
            ({"prompts": {"locate": "Locate <object> in the image."}}, "add them there or remove them"),
            ({"prompts": {"locate": "Locate it."}, "prompt_token_ids": None}, "tokenize 'Locate it.'"),
            ({"prompts": {"image": "Look."}, "prompt_token_ids": {"image": [0, 2]}}, "rename the prompt"),
            ({"prompt_token_ids": {"caption": [0, 40, 2], "ocr": [0, 2]}}, "has ids 0 to 39"),
            ({"image_token_id": 99}, "give one that no text uses"),
            ({"projector_depth": 0}, "at least 1"),
            ({"projector_hidden_act": "gelato"}, "gelato"),
        ],
    )
    def test_error_says_what_to_change(self, changes: dict[str, Any], message: str):
        with pytest.raises((ValueError, StrictDataclassError), match=message):
            tiny_config(**changes)

    def test_widths_of_tower_and_encoder_must_agree(self):
        vision_config = tiny_config().vision_config.to_dict()
        vision_config["text_config"]["d_model"] = 8
        with pytest.raises(ValueError, match="make them equal"):
            tiny_config(vision_config=vision_config)

    def test_heads_must_divide_widths(self):
        vision_config = tiny_config().vision_config.to_dict()
        vision_config["vision_config"]["num_groups"] = [3, 2, 4, 4]
        with pytest.raises(ValueError, match="num_groups"):
            tiny_config(vision_config=vision_config)
