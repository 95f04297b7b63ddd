# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Methods of peft, each in the language model alone."""

from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForImageTextToText

from florence_vl_hf.training import lora_target_modules

from ..conftest import tiny_inputs, tiny_model
from .test_adapters import labelled_inputs


LEARNED_PROMPT = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
METHODS = {
    "lora": lambda layers: peft.LoraConfig(target_modules=layers),
    "dora": lambda layers: peft.LoraConfig(target_modules=layers, use_dora=True),
    "ia3": lambda layers: peft.IA3Config(target_modules=layers, feedforward_modules=r".*\.down_proj"),
    "vera": lambda layers: peft.VeraConfig(target_modules=layers, r=8),
    "prefix": lambda layers: peft.PrefixTuningConfig(**LEARNED_PROMPT),
    "prompt": lambda layers: peft.PromptTuningConfig(**LEARNED_PROMPT),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose vision tower has as many embeddings as the language model."""
    directory = tmp_path_factory.mktemp("base")
    vision_config = tiny_model().config.vision_config.to_dict()
    vision_config["text_config"]["vocab_size"] = 99
    tiny_model(vision_config=vision_config).save_pretrained(directory)
    return directory


def load(base: Path, method: str) -> peft.PeftModel:
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(0)
    return peft.get_peft_model(model, METHODS[method](lora_target_modules(model)))


@pytest.mark.parametrize("method", METHODS)
def test_trains_and_loads_equal(method, base, tmp_path):
    model = load(base, method)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("language_model." in name or name.startswith("prompt_encoder.") for name in trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=0.05)
    inputs, losses = labelled_inputs(model.base_model, [1, 2]), []
    for _ in range(3):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1e-3
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == set(trained)

    model.eval().save_pretrained(tmp_path)
    plain = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    inputs = tiny_inputs(plain.config, [1, 2])
    with torch.no_grad():
        expected = model(**inputs).logits
        assert torch.equal(loaded(**inputs).logits, expected)
        other = {**inputs, "pixel_values": inputs["pixel_values"].flip(0)}
        assert not torch.allclose(loaded(**other).logits, expected, atol=1e-4)


def test_learned_prompt_is_that_of_the_language_model(base):
    model = load(base, "prompt")
    assert model.word_embeddings is model.base_model.model.language_model.embed_tokens
    assert model.prompt_encoder.default.embedding.weight.shape == (4, 32)
