# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import shutil
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from florence_vl_hf.conversion import CheckpointError, convert, read_original
from florence_vl_hf.conversion.original_config import Assumption

from .conftest import LLAMA, PHI, edit_config, edit_shard


class TestTower:
    def test_settings_of_its_directory(self):
        checkpoint = read_original(PHI.checkpoint)
        assert checkpoint.assumptions == []
        assert checkpoint.config.image_size == 160
        assert checkpoint.config.vision_config.text_config.encoder_attention_heads == 3
        assert checkpoint.config.num_image_tokens == checkpoint.processor.num_image_tokens == 26

    def test_without_its_directory_sizes_are_inferred_from_the_weights(self):
        told = read_original(LLAMA.checkpoint, vision_tower=LLAMA.vision_tower).config.vision_config
        checkpoint = read_original(LLAMA.checkpoint)
        guessed = checkpoint.config.vision_config
        for name in (
            "embed_dim",
            "depths",
            "patch_size",
            "patch_prenorm",
            "projection_dim",
            "max_position_embeddings",
        ):
            assert list(_listed(guessed.vision_config, name)) == list(_listed(told.vision_config, name)), name
        for name in ("vocab_size", "d_model", "encoder_layers", "encoder_ffn_dim", "max_position_embeddings"):
            assert getattr(guessed.text_config, name) == getattr(told.text_config, name), name
        assert checkpoint.config.image_size == 768
        expected = [Assumption.TOWER_CONFIG, Assumption.IMAGE_SIZE, Assumption.IMAGE_FEATURE_SOURCE]
        assert checkpoint.assumptions == expected

    @pytest.mark.parametrize(("source", "num_image_tokens"), [(["temporal_avg_pool"], 9), (["last_frame"], 9)])
    def test_image_feature_source_can_be_overridden(self, source, num_image_tokens, tmp_path):
        checkpoint = convert(LLAMA.checkpoint, tmp_path / "out", LLAMA.vision_tower, image_feature_source=source)
        assert checkpoint.config.num_image_tokens == num_image_tokens
        processor = AutoProcessor.from_pretrained(tmp_path / "out")
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
        inputs = processor(images=LLAMA.image("odd.jpg"), text="<image>Hi", return_tensors="pt")
        assert inputs["input_ids"].eq(processor.image_token_id).sum() == num_image_tokens
        assert torch.isfinite(model(**inputs).logits).all()

    def test_an_override_leaves_nothing_to_assume(self):
        source = ["spatial_avg_pool", "temporal_avg_pool"]
        assumptions = read_original(LLAMA.checkpoint, image_feature_source=source).assumptions
        assert assumptions == [Assumption.TOWER_CONFIG, Assumption.IMAGE_SIZE]

    def test_without_image_settings_the_size_is_assumed(self, phi_copy):
        (phi_copy / "vision_tower" / "preprocessor_config.json").unlink()
        checkpoint = read_original(phi_copy)
        assert checkpoint.assumptions == [Assumption.IMAGE_SIZE]
        assert checkpoint.config.image_size == 768

    def test_directory_in_the_layout_of_transformers(self, tmp_path):
        vision_config = read_original(PHI.checkpoint).config.vision_config
        vision_config.save_pretrained(tmp_path)
        shutil.copy(PHI.checkpoint / "vision_tower" / "preprocessor_config.json", tmp_path)
        checkpoint = read_original(PHI.checkpoint, vision_tower=tmp_path)
        assert checkpoint.config.vision_config.vision_config.to_dict() == vision_config.vision_config.to_dict()
        assert checkpoint.assumptions == [Assumption.IMAGE_FEATURE_SOURCE]


def _listed(config: Any, name: str) -> Any:
    value = getattr(config, name)
    return value if isinstance(value, list | tuple) else [value]


class TestRefusals:
    def test_llava_by_name(self, llama_copy):
        edit_config(llama_copy, mm_vision_tower="openai/clip-vit-large-patch14-336")
        edit_shard(llama_copy, lambda tensors: [tensors.pop(name) for name in list(tensors) if "vision_tower" in name])
        with pytest.raises(CheckpointError, match="clip-vit-large-patch14-336.*is a LLaVA, not a Florence-VL"):
            read_original(llama_copy, vision_tower=LLAMA.vision_tower)

    def test_checkpoint_in_this_packages_layout(self, converted):
        with pytest.raises(CheckpointError, match="in this package's layout already"):
            read_original(converted)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"model_type": "bert"}, "model type 'bert', expected one of llava_llama"),
            ({"mm_projector_type": "linear"}, "projector of type 'linear'"),
            ({"mm_projector_type": "mlp2x_gelu"}, "layers.2.weight|encoder_mlp.2.1"),
            ({"hidden_size": 32}, "expected .*32"),
            ({"vocab_size": 400}, "has 482 tokens, but .* size is 400"),
        ],
    )
    def test_configuration_that_does_not_match(self, changes, message, llama_copy):
        edit_config(llama_copy, **changes)
        with pytest.raises(CheckpointError, match=message):
            read_original(llama_copy, vision_tower=LLAMA.vision_tower)
