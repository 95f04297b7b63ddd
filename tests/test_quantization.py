# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import importlib.util
import json
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModel, AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedModel

from florence_vl_hf import conversion
from florence_vl_hf.quantization import quantization_config
from florence_vl_hf.training import lora_config

from .conftest import status, tiny_inputs, tiny_model


def requires(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"requires {package}")


TORCHAO, QUANTO = requires("torchao"), requires("optimum")
# Each with the largest difference of logits from those in full precision, which are up to 0.7.
BACKENDS = [
    pytest.param({"bits": 4, "compute_dtype": torch.float32}, 0.2, id="bitsandbytes-4"),
    pytest.param({"bits": 8}, 0.02, id="bitsandbytes-8"),
    pytest.param({"bits": 8, "backend": "torchao"}, 0.02, id="torchao-int8", marks=TORCHAO),
    pytest.param({"bits": 8, "backend": "torchao", "floating_point": True}, 0.06, id="torchao-float8", marks=TORCHAO),
    pytest.param({"bits": 8, "backend": "quanto"}, 0.02, id="quanto-int8", marks=QUANTO),
    pytest.param({"bits": 8, "backend": "quanto", "floating_point": True}, 0.06, id="quanto-float8", marks=QUANTO),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose hidden size fills a block of 4-bit weights of bitsandbytes; 32 does not."""
    directory = tmp_path_factory.mktemp("to_quantize")
    text_config = {"model_type": "llama", "vocab_size": 99, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = tiny_model(text_config={**text_config, **tokens, "hidden_size": 128, "intermediate_size": 128})
    model.save_pretrained(directory)
    return directory


def load(directory: Path, auto_class: Any = AutoModelForImageTextToText, **settings: Any) -> PreTrainedModel:
    return auto_class.from_pretrained(directory, device_map="cpu", dtype=torch.float32, **settings).eval()


def quantized_layers(model: nn.Module) -> set[str]:
    """Names of linear layers of another class, or whose weights are of another class."""
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (type(module), type(module.weight)) != (nn.Linear, nn.Parameter)
    }


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(**tiny_inputs(model.config, [1, 2])).logits


@pytest.mark.parametrize(("settings", "tolerance"), BACKENDS)
def test_quantizes_exactly_the_language_model(settings, tolerance, directory):
    expected = {n for n, module in load(directory, AutoModel).named_modules() if isinstance(module, nn.Linear)}
    expected = {name for name in expected if name.startswith("language_model.")}
    assert len(expected) == 14
    for auto_class, prefix in ((AutoModelForImageTextToText, "model."), (AutoModel, "")):
        model = load(directory, auto_class, quantization_config=quantization_config(**settings))
        assert quantized_layers(model) == {prefix + name for name in expected}
        if settings.get("backend") != "quanto":
            assert {prefix + name for name in expected} == set(
                get_peft_model(model, lora_config(model)).targeted_module_names
            )


@pytest.mark.parametrize(("settings", "tolerance"), BACKENDS)
def test_agrees_with_full_precision_and_loads_equal(settings, tolerance, directory, tmp_path):
    model = load(directory, quantization_config=quantization_config(**settings))
    if settings.get("backend") == "quanto":
        with pytest.raises(ValueError, match="not serializable"):
            model.save_pretrained(tmp_path)
    else:
        # Before any forward pass: on some CPUs, bitsandbytes then converts 4-bit weights, and does not restore them.
        model.save_pretrained(tmp_path)
    found, expected = logits(model), logits(load(directory))
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)

    if settings.get("backend") != "quanto":
        loaded = load(tmp_path)
        assert quantized_layers(loaded) == quantized_layers(model)
        assert torch.equal(logits(loaded), found)
        sizes = [(path / "model.safetensors").stat().st_size for path in (tmp_path, directory)]
        assert sizes[0] < 0.7 * sizes[1]


def test_each_entry_is_needed(directory):
    """Without the list, or with only the names of the parts, more is quantized."""
    for skipped, expected in ((None, "model.vision_tower."), (["vision_tower"], "lm_head")):
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
        model = load(directory, quantization_config=config)
        assert any(name.startswith(expected) for name in quantized_layers(model))


def test_four_bits_are_those_of_qlora():
    config = quantization_config(4, compute_dtype=torch.float16)
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("nf4", True)
    assert config.bnb_4bit_compute_dtype == torch.float16


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"bits": 3}, "int3"),
        ({"bits": 8, "floating_point": True}, "float8"),
        ({"bits": 4, "backend": "torchao"}, "int4"),
        ({"bits": 8, "backend": "gptq"}, "int8"),
    ],
)
def test_other_weights(settings, kind):
    with pytest.raises(ValueError, match=f"Got {kind} weights of .*, expected int4 or int8 of 'bitsandbytes'"):
        quantization_config(**settings)


class TestCommandLine:
    @pytest.mark.parametrize("command", ["chat", "serve"])
    @pytest.mark.parametrize(
        ("options", "kind"),
        [
            ([], nn.Linear),
            (["--load-in-4bit"], bitsandbytes.nn.Linear4bit),
            (["--load-in-8bit"], bitsandbytes.nn.Linear8bitLt),
        ],
    )
    @pytest.mark.parametrize("golden", ["llama-small"], indirect=True, scope="session")
    def test_quantizes_the_language_model(self, command, options, kind, converted, monkeypatch):
        loaded = []
        load_pretrained = conversion.load_pretrained

        def load_and_stop(*args: Any, **kwargs: Any) -> None:
            loaded.append(load_pretrained(*args, **kwargs)[0])
            raise ValueError("loaded")

        monkeypatch.setattr(conversion, "load_pretrained", load_and_stop)
        assert status(command, converted, "--device", "cpu", *options, *["--port", "0"] * (command == "serve")) == 1
        assert type(loaded[0].model.language_model.layers[0].self_attn.q_proj) is kind

    @pytest.mark.parametrize("command", ["chat", "serve"])
    def test_both_options(self, command, capfd):
        assert status(command, "anywhere", "--load-in-4bit", "--load-in-8bit") == 2
        assert "choose one" in capfd.readouterr().err

    @pytest.mark.parametrize("golden", ["llama-small"], indirect=True, scope="session")
    def test_answers_of_other_weights_are_not_mixed(self, golden, converted, tmp_path):
        output = tmp_path / "answers.jsonl"
        command = ["predict", golden.folder / "images", converted, "--question", "What?", "--output", output]
        command += ["--device", "cpu", "--max-new-tokens", "2"]
        assert status(*command, "--load-in-8bit") == 0
        settings = json.loads((tmp_path / "answers.jsonl.settings.json").read_text())
        assert settings["quantization_config"]["load_in_8bit"]
        assert status(*command, "--load-in-8bit") == 0
        assert status(*command) == 1
