# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import json

import pytest

from florence_vl_hf.conversion.key_mapping import TIED_WORDS, to_converted, to_original


def test_every_name_of_an_original_is_known_and_comes_back(golden):
    index = json.loads((golden.checkpoint / "model.safetensors.index.json").read_text())
    for name in index["weight_map"]:
        mapped = to_converted(name)
        assert mapped is not None, name
        if mapped.name is not None:
            assert name in [original.name for original in to_original(mapped.name)]


@pytest.mark.parametrize(
    ("original", "converted", "transposed"),
    [
        ("model.layers.31.mlp.gate_proj.weight", "model.language_model.layers.31.mlp.gate_proj.weight", False),
        ("model.layers.0.self_attn.qkv_proj.weight", "model.language_model.layers.0.self_attn.qkv_proj.weight", False),
        ("model.mm_projector.encoder_mlp.0.bias", "model.multi_modal_projector.layers.0.bias", False),
        ("model.mm_projector.encoder_mlp.2.1.weight", "model.multi_modal_projector.layers.2.weight", False),
        (
            "model.vision_tower.vision_tower.image_projection",
            "model.vision_tower.image_projector.image_projection.weight",
            True,
        ),
        (
            "model.vision_tower.vision_tower.vision_tower.blocks.2.8.channel_block.channel_attn.fn.qkv.weight",
            "model.vision_tower.backbone.blocks.2.8.channel_block.channel_attn.qkv.weight",
            False,
        ),
        (
            "model.vision_tower.vision_tower.language_model.model.encoder.layers.11.fc1.bias",
            "model.vision_tower.encoder.layers.11.fc1.bias",
            False,
        ),
        ("lm_head.weight", "lm_head.weight", False),
    ],
)
def test_names(original, converted, transposed):
    mapped = to_converted(original)
    assert (mapped.name, mapped.transposed) == (converted, transposed)
    assert (original, transposed) in [(back.name, back.transposed) for back in to_original(converted)]


def test_embedding_table_goes_back_to_the_names_that_are_stored():
    names = to_original("model.vision_tower.encoder.embed_tokens.weight")
    prefix = "model.vision_tower.vision_tower."
    assert [name.name.removeprefix(prefix) for name in names] == [
        "language_model.model.shared.weight",
        "language_model.lm_head.weight",
    ]
    assert {to_converted(prefix + name).name for name in TIED_WORDS} == {
        "model.vision_tower.encoder.embed_tokens.weight"
    }
    assert TIED_WORDS[0] == "language_model.model.shared.weight" and len(TIED_WORDS) == len(set(TIED_WORDS)) == 6


@pytest.mark.parametrize(
    ("native", "converted"),
    [
        ("vision_tower.convs.0.conv.weight", "backbone.convs.0.conv.weight"),
        ("multi_modal_projector.image_projection.weight", "image_projector.image_projection.weight"),
        ("language_model.encoder.layers.0.fc1.bias", "encoder.layers.0.fc1.bias"),
        ("language_model.shared.weight", "encoder.embed_tokens.weight"),
        ("lm_head.weight", "encoder.embed_tokens.weight"),
        ("language_model.decoder.layers.0.fc1.bias", None),
    ],
)
def test_names_of_transformers_own_florence_2(native, converted):
    mapped = to_converted("model.vision_tower.vision_tower." + native)
    assert (mapped.name, mapped.transposed) == (converted and f"model.vision_tower.{converted}", False)


def test_decoder_is_known_but_not_used():
    prefix = "model.vision_tower.vision_tower.language_model."
    for name in ("model.decoder.layers.0.fc1.weight", "model.decoder.layernorm_embedding.bias", "final_logits_bias"):
        assert to_converted(prefix + name).name is None


@pytest.mark.parametrize(
    "name",
    [
        "model.vision_tower.vision_tower.vision_model.embeddings.weight",
        "model.mm_projector.encoder_mlp.0.1.weight",  # the first layer is encoder_mlp.0
        "model.other",
        "x",
    ],
)
def test_unknown_names_are_not_guessed(name):
    assert to_converted(name) is None
