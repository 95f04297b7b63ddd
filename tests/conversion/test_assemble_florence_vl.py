# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import ByteLevelBPETokenizer
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    BartTokenizer,
    Florence2Config,
    Florence2ForConditionalGeneration,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from florence_vl_hf.conversion import CheckpointError, assemble
from florence_vl_hf.conversion.key_mapping import to_converted, to_original
from florence_vl_hf.conversion.original_config import Assumption
from florence_vl_hf.modeling.configuration_florence_vl import DEFAULT_PROMPT_TOKEN_IDS

from ..conftest import FIXTURES, status, tiny_config
from .conftest import all_tensors


FIRST_RELEASE = FIXTURES / "phi-small" / "checkpoint" / "vision_tower"
SENTENCES = ["Locate the sign in the image. What is the text? Describe it, and say hello to the world."] * 4
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "initializer_range": 0.5,
}
# Configuration, and rows of the embedding table without a token: with any, `<image>` takes one.
LANGUAGE_MODELS = {
    "llama": (LlamaConfig, {"tie_word_embeddings": False}, 0),
    "llama-tied": (LlamaConfig, {"tie_word_embeddings": True}, 0),
    "qwen2-tied": (Qwen2Config, {"tie_word_embeddings": True}, 5),
    "phi3": (Phi3Config, {"num_key_value_heads": 4}, 3),
    "mistral": (MistralConfig, {"sliding_window": None}, 0),
}


def _trained_tokenizer(special_tokens: list[str]) -> ByteLevelBPETokenizer:
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(SENTENCES, vocab_size=300, special_tokens=special_tokens, show_progress=False)
    return tokenizer


def save_llm(directory: Path, name: str, **tokens: str) -> Path:
    """A tiny language model and its tokenizer, as Transformers saves them."""
    config_class, changes, num_free_rows = LANGUAGE_MODELS[name]
    tokens = {"bos_token": "<s>", "eos_token": "</s>", **tokens}
    backend = _trained_tokenizer(["<s>", "</s>", "<|reserved|>", *[t for t in tokens.values() if t[1:] > "s>"]])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend._tokenizer, **tokens)
    torch.manual_seed(3)
    config = config_class(vocab_size=len(tokenizer) + num_free_rows, **{**SIZES, **changes})
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def save_tower_tokenizer(directory: Path) -> BartTokenizer:
    """A tiny tokenizer of BART's kind, in the two files that Florence-2's first release has."""
    _trained_tokenizer(["<s>", "<pad>", "</s>", "<unk>", "<mask>"]).save_model(str(directory))
    return BartTokenizer.from_pretrained(directory)


def tower_config() -> Florence2Config:
    config = tiny_config().vision_config.to_dict()
    config["text_config"]["vocab_size"] = 51289  # so that the paper's prompts have rows
    return Florence2Config(**{name: config[name] for name in ("vision_config", "text_config")})


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Florence-2 in Transformers' own layout, for images of 64 x 64."""
    directory = tmp_path_factory.mktemp("native")
    torch.manual_seed(4)
    model = Florence2ForConditionalGeneration(tower_config())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory)
    images = {"size": {"height": 64, "width": 64}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (directory / "preprocessor_config.json").write_text(json.dumps(images))
    save_tower_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def first_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Florence-2 in the layout of its first release; its pytorch_model.bin would be slow to read."""
    directory = tmp_path_factory.mktemp("first_release")
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(FIRST_RELEASE / name, directory)
    tensors = torch.load(FIRST_RELEASE / "pytorch_model.bin", weights_only=True)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, directory / "model.safetensors")
    return directory


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llm(tmp_path_factory.mktemp("llama"), "llama")


def load(directory: Path) -> tuple[Any, Any]:
    model, report = AutoModelForImageTextToText.from_pretrained(directory, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return model.eval(), AutoProcessor.from_pretrained(directory)


class TestLanguageModel:
    @pytest.mark.parametrize("name", LANGUAGE_MODELS)
    def test_logits_and_tokens_are_the_language_models(self, name, native, tmp_path):
        llm = save_llm(tmp_path / "llm", name)
        assemble(native, llm, tmp_path / "out")
        model, processor = load(tmp_path / "out")
        expected = AutoModelForCausalLM.from_pretrained(llm).eval()
        own = PreTrainedTokenizerFast.from_pretrained(llm)
        inputs = processor(text="Describe the world.", return_tensors="pt")
        assert inputs["input_ids"].tolist()[0] == own("Describe the world.").input_ids
        # Rows added to a tied table are zero.
        named = len(own)
        assert_close(model(**inputs).logits[..., :named], expected(input_ids=inputs["input_ids"]).logits[..., :named])
        assert model.config.tie_word_embeddings == LANGUAGE_MODELS[name][1].get("tie_word_embeddings", False)
        assert ("lm_head.weight" in all_tensors(tmp_path / "out")) != model.config.tie_word_embeddings
        assert processor.image_token_id not in own.get_vocab().values()
        assert model.config.text_config.pad_token_id == processor.tokenizer.pad_token_id is not None

        inputs = processor(text="<image>Hello", images=Image.new("RGB", (30, 20), "red"), return_tensors="pt")
        assert inputs["pixel_values"].shape == (1, 3, 64, 64) and not processor.image_processor.do_pad
        generated = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert generated.shape[1] == inputs["input_ids"].shape[1] + 3

    @pytest.mark.parametrize(
        ("tokens", "padding"),
        [
            ({"additional": "<|finetune_right_pad_id|>", "unk_token": "<unk>"}, "<|finetune_right_pad_id|>"),
            ({"unk_token": "<unk>"}, "<unk>"),
            ({}, "</s>"),
            ({"pad_token": "<|reserved|>"}, "<|reserved|>"),
        ],
    )
    def test_padding(self, tokens, padding, native, tmp_path):
        checkpoint = assemble(native, save_llm(tmp_path / "llm", "llama", **tokens), tmp_path / "out")
        assert checkpoint.processor.tokenizer.pad_token == padding
        assert (Assumption.PADDING_TOKEN in checkpoint.assumptions) == ("pad_token" not in tokens)

    def test_unsupported_language_models_are_refused_by_name(self, native, llama, tmp_path):
        with pytest.raises(CheckpointError, match="model type 'florence2', expected a causal language model"):
            assemble(native, native, tmp_path / "out")
        broken = Path(shutil.copytree(llama, tmp_path / "broken"))
        config = json.loads((broken / "config.json").read_text())
        (broken / "config.json").write_text(json.dumps(config | {"model_type": "mamba9000"}))
        with pytest.raises(ValueError, match="model type `mamba9000`"):
            assemble(native, broken, tmp_path / "out")
        (broken / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
        with pytest.raises(CheckpointError, match="embed_tokens.weight in .* has shape"):
            assemble(native, broken, tmp_path / "out")
        (broken / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
        with pytest.raises(CheckpointError, match="missing: model.layers.2"):
            assemble(native, broken, tmp_path / "out")


class TestTower:
    def test_features_are_those_of_transformers_florence_2(self, native, llama, tmp_path):
        assemble(native, llama, tmp_path / "out")
        model, _ = load(tmp_path / "out")
        florence = Florence2ForConditionalGeneration.from_pretrained(native).eval()
        pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        features = model.get_image_features(pixels).features
        image = florence.get_image_features(pixels, return_dict=True).pooler_output
        image = torch.stack(list(image)) if isinstance(image, list | tuple) else image
        assert_close(features["image"], image)
        embed_tokens = florence.get_input_embeddings()
        for name, token_ids in DEFAULT_PROMPT_TOKEN_IDS.items():
            prompt = embed_tokens(torch.tensor(token_ids)).expand(2, -1, -1)
            encoded = florence.model.language_model.encoder(inputs_embeds=torch.cat([image, prompt], dim=1))
            assert_close(features[name], encoded.last_hidden_state[:, : image.shape[1]])

    def test_first_release(self, first_release, llama, tmp_path):
        assemble(first_release, llama, tmp_path / "out")
        model, _ = load(tmp_path / "out")
        assert (model.config.image_size, model.config.num_image_tokens) == (160, 26)
        original = all_tensors(first_release)
        ours, num_compared = model.state_dict(), 0
        for name, tensor in original.items():
            mapped = to_converted("model.vision_tower.vision_tower." + name)
            if mapped.name is not None:
                expected = tensor.T if mapped.transposed else tensor
                assert_close(ours[mapped.name], expected.float(), rtol=0, atol=0)
                num_compared += 1
        assert num_compared > 100

    def test_both_layouts_and_older_saves_are_equal(self, native, llama, tmp_path):
        stored = {name.removeprefix("model."): tensor for name, tensor in all_tensors(native).items()}
        prefix, first = "model.vision_tower.vision_tower.", {}
        for name, tensor in stored.items():
            converted = to_converted(prefix + name).name
            if converted is not None:
                original = to_original(converted)[0]
                first[original.name.removeprefix(prefix)] = tensor.T if original.transposed else tensor
        assert not stored.keys() & {"image_projection"} and "image_projection" in first
        layouts = {"first": first, "older": stored}
        for name, layout in layouts.items():
            directory = tmp_path / name
            directory.mkdir()
            for file in native.glob("*.json"):
                shutil.copy(file, directory)
            save_file({name: t.contiguous() for name, t in layout.items()}, directory / "model.safetensors")
            assemble(directory, llama, tmp_path / f"{name}-out")
        assemble(native, llama, tmp_path / "native-out")
        for name in layouts:
            assert_close(all_tensors(tmp_path / f"{name}-out"), all_tensors(tmp_path / "native-out"), rtol=0, atol=0)

    def test_image_settings_in_processor_config(self, native, llama, tmp_path):
        directory = Path(shutil.copytree(native, tmp_path / "tower"))
        images = json.loads((directory / "preprocessor_config.json").read_text())
        (directory / "preprocessor_config.json").unlink()
        (directory / "processor_config.json").write_text(json.dumps({"image_processor": images}))
        checkpoint = assemble(directory, llama, tmp_path / "out")
        assert checkpoint.config.image_size == 64
        assert checkpoint.processor.image_processor.image_mean == (0.5, 0.5, 0.5)


class TestNewModel:
    def test_is_reproducible_and_projector_layers_differ(self, native, llama, tmp_path):
        for name in ("one", "two"):
            assemble(native, llama, tmp_path / name)
        one, two = all_tensors(tmp_path / "one"), all_tensors(tmp_path / "two")
        assert one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)
        layers = [one[f"model.multi_modal_projector.layers.{i}.weight"] for i in range(3)]
        assert not layers[1].equal(layers[2])
        for layer in layers:
            assert layer.std() == pytest.approx(SIZES["initializer_range"], rel=0.1)
        assert not any(one[f"model.multi_modal_projector.layers.{i}.bias"].any() for i in range(3))

    def test_dtype(self, native, first_release, llama, tmp_path):
        checkpoint = assemble(native, llama, tmp_path / "out", dtype=torch.bfloat16)
        assert {tensor.dtype for tensor in all_tensors(tmp_path / "out").values()} == {torch.bfloat16}
        assert checkpoint.config.dtype == torch.bfloat16
        by_default = assemble(first_release, llama, tmp_path / "by_default")
        assert {tensor.dtype for tensor in by_default.tensors.values()} == {torch.float32}

    def test_fusion_features_and_prompts(self, native, llama, tmp_path):
        prompts = {"locate": "Locate the sign in the image.", "ocr": "What is the text?"}
        checkpoint = assemble(
            native, llama, tmp_path / "out", "token", ["image", "ocr", "locate"], prompts, projector_depth=2
        )
        tokenizer = BartTokenizer.from_pretrained(native)
        for name, text in prompts.items():
            assert checkpoint.config.prompts[name] == text
            assert checkpoint.config.prompt_token_ids[name] == tokenizer(text).input_ids
            assert [tokenizer.bos_token_id, tokenizer.eos_token_id] == checkpoint.config.prompt_token_ids[name][
                :: len(checkpoint.config.prompt_token_ids[name]) - 1
            ]
        assert checkpoint.config.prompt_token_ids["caption"] == DEFAULT_PROMPT_TOKEN_IDS["caption"]
        model, processor = load(tmp_path / "out")
        assert len(model.model.multi_modal_projector.layers) == 2
        assert processor.num_image_tokens == model.config.num_image_tokens == 15
        assert list(model.get_image_features(torch.zeros(1, 3, 64, 64)).features) == ["image", "ocr", "locate"]

    def test_prompt_requires_the_towers_tokenizer(self, first_release, llama, tmp_path):
        with pytest.raises(CheckpointError, match="first_release.* has no tokenizer"):
            assemble(first_release, llama, tmp_path / "out", prompts={"locate": "Locate the sign."})

    def test_image_feature_source(self, native, llama, tmp_path):
        assumptions = assemble(native, llama, tmp_path / "assumed").assumptions
        assert Assumption.IMAGE_FEATURE_SOURCE in assumptions
        checkpoint = assemble(native, llama, tmp_path / "given", image_feature_source=["temporal_avg_pool"])
        assert checkpoint.config.num_image_tokens == 4
        assert Assumption.IMAGE_FEATURE_SOURCE not in checkpoint.assumptions


class TestCommand:
    def test_assemble(self, native, llama, tmp_path, capfd, caplog):
        parts = ["--vision-tower", native, "--llm", llama, "--output", tmp_path / "out"]
        prompt = [
            "--prompt",
            'locate=Locate "the" sign = here.',
            "--features",
            "image,caption",
            "--features",
            "locate",
        ]
        assert status("assemble", *parts, *prompt, "--fusion", "average", "--dtype", "bfloat16") == 0
        printed = capfd.readouterr()
        assert "average fusion of image, caption, locate" in printed.out and "5 tokens per image" in printed.out
        assert "Writing weights" in printed.err and "no padding token" in caplog.text
        config = load(tmp_path / "out")[0].config
        assert config.prompts["locate"] == 'Locate "the" sign = here.'

    def test_chat_template_is_plain_by_default(self, native, llama, tmp_path):
        assert status("assemble", "--vision-tower", native, "--llm", llama, "--output", tmp_path / "out") == 0
        processor = AutoProcessor.from_pretrained(tmp_path / "out")
        content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "A sign."}]
        assert processor.apply_chat_template(messages) == "<image>A sign.\n"

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (["--prompt", "locate"], 2, "NAME="),
            (["--prompt", "image=What?"], 1, "A prompt is named 'image'"),
            (["--features", "image,locate"], 1, "give one or more of"),
            (["--fusion", "sum"], 2, "sum"),
            (["--chat-template", "chatml"], 1, "choose one of"),
        ],
    )
    def test_wrong_use(self, arguments, code, message, native, llama, tmp_path, capfd):
        parts = ["--vision-tower", native, "--llm", llama, "--output", tmp_path / "out"]
        assert status("assemble", *parts, *arguments) == code
        assert message in capfd.readouterr().err
        assert not (tmp_path / "out").exists()
