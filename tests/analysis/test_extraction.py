# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Features from whole models, and from vision encoders that are loaded without a language model."""

import shutil

import pytest
import torch
from torch.testing import assert_close
from transformers import Florence2ForConditionalGeneration

from florence_vl_hf.analysis import extract_features, load_vision_encoder
from florence_vl_hf.analysis.extraction import position_tokens
from florence_vl_hf.conversion import load_original
from florence_vl_hf.modeling.configuration_florence_vl import DEFAULT_PROMPT_TOKEN_IDS

from ..conftest import tiny_config, tiny_model
from ..conversion.test_assemble_florence_vl import first_release, native


__all__ = ["first_release", "native"]


@pytest.fixture
def original(golden, tmp_path):
    """The original checkpoint, with its vision tower inside."""
    directory = shutil.copytree(golden.checkpoint, tmp_path / "original")
    if golden.vision_tower is not None:
        shutil.copytree(golden.vision_tower, directory / "vision_tower")
    return directory


class TestExtractFeatures:
    def test_equal_the_models_own(self, model, processor, golden):
        paths = [golden.image_path(name) for name in ("odd.jpg", "square.png", "gray.png")]
        pixels = processor.image_processor([golden.image(path.name) for path in paths], return_tensors="pt")
        expected = model.get_image_features(pixels["pixel_values"]).features
        for network in (model, model.model):
            extracted = list(extract_features(network, paths, image_processor=processor.image_processor, batch_size=2))
            assert len(extracted) == 3
            for i, image in enumerate(extracted):
                assert_close(image.tokens, {name: feature[i] for name, feature in expected.items()})

    def test_reads_prompts_that_the_model_does_not_fuse_and_others(self):
        pixels = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        whole, part = tiny_model(), tiny_model(fusion_features=["ocr"])
        part.load_state_dict({**part.state_dict(), **{k: v for k, v in whole.state_dict().items() if "tower" in k}})
        expected = whole.get_image_features(pixels).features
        extracted = list(extract_features(part, pixels, {"person": [0, 5, 6, 7, 8, 2], "read": [0, 9, 2, 1]}))
        for i, image in enumerate(extracted):
            assert list(image.tokens) == ["image", "caption", "ocr", "person", "read"]
            for name in ("image", "caption", "ocr"):
                assert_close(image.tokens[name], expected[name][i])
            assert_close(image.tokens["read"], image.tokens["ocr"])
            assert (image.tokens["person"] - image.tokens["ocr"]).abs().max() > 1e-3
        assert list(part.get_image_features(pixels).features) == ["ocr"]

    @pytest.mark.parametrize(
        ("sources", "start"),
        [
            (("spatial_avg_pool", "temporal_avg_pool"), 1),
            (("last_frame", "spatial_avg_pool"), 0),
            (("temporal_avg_pool", "last_frame"), 0),
        ],
    )
    def test_maps_are_the_positions(self, sources, start):
        model = tiny_model(image_feature_source=sources, image_size=96)
        [image] = extract_features(model, torch.zeros(1, 3, 96, 96))
        tokens = image.tokens["ocr"]
        assert image.grid_size == (3, 3) and image.maps["ocr"].shape == (3, 3, 16)
        assert_close(image.maps["ocr"][2, 1], tokens[start + 7], rtol=0, atol=0)

    def test_averages_have_no_maps(self):
        config = tiny_config(image_feature_source=["spatial_avg_pool"])
        assert position_tokens(config) == slice(0, 0)
        [image] = extract_features(tiny_model(image_feature_source=["spatial_avg_pool"]), torch.zeros(1, 3, 64, 64))
        assert image.maps == {} and image.tokens["image"].shape == (1, 16)


class TestLoadVisionEncoder:
    def test_converted_and_original(self, golden, converted, original, monkeypatch):
        model, processor = load_original(original, dtype=torch.float32)
        paths = [golden.image_path("odd.jpg")]
        [expected] = extract_features(model, paths, image_processor=processor.image_processor)
        for directory in (converted, original):
            encoder = load_vision_encoder(directory, dtype=torch.float32)
            [extracted] = extract_features(encoder, paths)
            assert_close(extracted.tokens, expected.tokens, rtol=0, atol=0)
            assert not any("decoder" in name for name, _ in encoder.vision_tower.named_parameters())

    def test_florence_2_of_transformers(self, native):
        encoder = load_vision_encoder(native)
        florence = Florence2ForConditionalGeneration.from_pretrained(native).eval()
        pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        extracted = list(extract_features(encoder, pixels, {"sign": "Locate the sign in the image."}))
        image = florence.get_image_features(pixels, return_dict=True).pooler_output
        image = torch.stack(list(image)) if isinstance(image, list | tuple) else image
        assert_close(torch.stack([one.tokens["image"] for one in extracted]), image)
        prompts = {**DEFAULT_PROMPT_TOKEN_IDS, "sign": encoder_tokens(native, "Locate the sign in the image.")}
        assert list(extracted[0].tokens) == ["image", *prompts]
        for name, token_ids in prompts.items():
            prompt = florence.get_input_embeddings()(torch.tensor(token_ids)).expand(2, -1, -1)
            encoded = florence.model.language_model.encoder(inputs_embeds=torch.cat([image, prompt], dim=1))
            expected = encoded.last_hidden_state[:, : image.shape[1]]
            assert_close(torch.stack([one.tokens[name] for one in extracted]), expected)

    def test_florence_2_of_the_first_release(self, first_release, converted, golden):
        if golden.folder.name != "phi-small":  # whose tower it is
            pytest.skip()
        encoder = load_vision_encoder(converted)
        dtype = encoder.vision_tower.dtype
        ours = load_vision_encoder(first_release, dtype=dtype)
        assert_close(ours.vision_tower.state_dict(), encoder.vision_tower.state_dict(), rtol=0, atol=0)
        [one], [other] = (extract_features(one, [golden.image_path("square.png")]) for one in (ours, encoder))
        assert_close(one.tokens, other.tokens, rtol=0, atol=0)


def encoder_tokens(directory, text):
    from transformers import BartTokenizer

    return BartTokenizer.from_pretrained(directory)(text).input_ids
