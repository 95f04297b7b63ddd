# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig

from florence_vl_hf import FlorenceVLForConditionalGeneration, FlorenceVLProcessor
from florence_vl_hf.conversion import (
    CheckpointError,
    convert,
    is_original,
    load_original,
    load_pretrained,
    read_original,
)

from ..conftest import Golden, tiny_model
from .conftest import LLAMA, all_tensors, edit_config, remove_weights


@pytest.fixture(scope="module")
def original(golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An original checkpoint with its tower's directory inside, as after pretraining."""
    directory = tmp_path_factory.mktemp("original") / golden.folder.name
    shutil.copytree(golden.checkpoint, directory)
    if golden.vision_tower is not None:
        shutil.copytree(golden.vision_tower, directory / "vision_tower")
    return directory


@pytest.fixture(params=["original", "converted"])
def source(request: pytest.FixtureRequest, original: Path, converted: Path) -> Path:
    return {"original": original, "converted": converted}[request.param]


def names_in(directory: Path) -> set[str]:
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        return set(file.keys())


def assert_same_weights(model: FlorenceVLForConditionalGeneration, expected: FlorenceVLForConditionalGeneration):
    assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("load", [load_original, load_pretrained])
def test_same_model_as_after_a_conversion(load, original, converted, tmp_path):
    (model, report), processor = load(original, output_loading_info=True)
    assert type(model) is FlorenceVLForConditionalGeneration and type(processor) is FlorenceVLProcessor
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    expected = AutoModelForImageTextToText.from_pretrained(converted)
    assert_same_weights(model, expected)
    assert model.dtype == expected.dtype == torch.bfloat16
    assert model.generation_config.to_dict() == expected.generation_config.to_dict()
    assert model.config.name_or_path == model.name_or_path == str(original)

    model.save_pretrained(tmp_path)
    assert names_in(tmp_path) == names_in(converted)
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert_same_weights(saved, expected)
    assert saved.config.model_type == "florence_vl"


def test_same_configuration_as_after_a_conversion(original, converted):
    # Remote code and the path are the converted one's own.
    own = {"auto_map", "_name_or_path"}
    for config, expected in (
        (load_original(original)[0].config, AutoModelForImageTextToText.from_pretrained(converted).config),
        (read_original(original).config, AutoConfig.from_pretrained(converted)),
    ):
        settings, expected_settings = config.to_dict(), expected.to_dict()
        assert {k: settings[k] for k in settings if k not in own} == {
            k: expected_settings[k] for k in expected_settings if k not in own
        }


def without_auto_map(settings: dict) -> dict:
    """`save_pretrained` adds `auto_map` to the processor that it saves."""
    nested = {name: without_auto_map(value) if isinstance(value, dict) else value for name, value in settings.items()}
    return {name: value for name, value in nested.items() if name != "auto_map"}


def test_same_processor_as_after_a_conversion(original, processor):
    _, loaded = load_original(original)
    assert without_auto_map(loaded.to_dict()) == without_auto_map(processor.to_dict())
    assert loaded.chat_template == processor.chat_template
    assert loaded.tokenizer.get_vocab() == processor.tokenizer.get_vocab()


@pytest.mark.parametrize("device_map", [None, "cpu", "auto"])
def test_arguments_of_from_pretrained(device_map, original, converted):
    arguments = {"dtype": torch.float32, "attn_implementation": "eager", "device_map": device_map}
    model, _ = load_original(original, **arguments)
    assert model.dtype == torch.float32
    assert model.model.language_model.config._attn_implementation == "eager"
    assert_same_weights(model, AutoModelForImageTextToText.from_pretrained(converted, **arguments))


def test_quantized(original):
    settings = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["vision_tower", "lm_head"])
    model, _ = load_original(original, quantization_config=settings, device_map="cpu")
    kinds = {type(module).__name__ for module in model.model.language_model.layers.modules()}
    assert model.is_quantized and "Linear8bitLt" in kinds


def test_tower_given_apart(converted):
    if LLAMA.folder.name != converted.name:
        pytest.skip("its tower is inside")
    model, _ = load_original(LLAMA.checkpoint, vision_tower=LLAMA.vision_tower)
    assert_same_weights(model, AutoModelForImageTextToText.from_pretrained(converted))


def test_tower_with_its_weights_in_another_directory(phi_copy, tmp_path):
    tensors = {name: tensor for name, tensor in all_tensors(phi_copy).items() if "vision_tower" not in name}
    remove_weights(phi_copy)
    save_file(tensors, phi_copy / "model.safetensors")
    model, _ = load_original(phi_copy)
    convert(phi_copy, tmp_path / "converted")
    assert_same_weights(model, AutoModelForImageTextToText.from_pretrained(tmp_path / "converted"))


def test_tied_embeddings(llama_copy, tmp_path):
    edit_config(llama_copy, tie_word_embeddings=True)
    model, _ = load_original(llama_copy, vision_tower=LLAMA.vision_tower)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    convert(llama_copy, tmp_path / "converted", LLAMA.vision_tower)
    assert_same_weights(model, AutoModelForImageTextToText.from_pretrained(tmp_path / "converted"))


@pytest.mark.parametrize(
    "fusion", [{"fusion_strategy": "average", "fusion_features": ["image", "ocr"]}, {"fusion_strategy": "token"}]
)
def test_another_fusion(fusion, source):
    """Training ablations change the fusion, which needs another first layer of the projector."""
    (model, report), processor = load_pretrained(
        source, output_loading_info=True, ignore_mismatched_sizes=True, **fusion
    )
    assert model.config.fusion_strategy == fusion["fusion_strategy"]
    assert processor.num_image_tokens == model.config.num_image_tokens
    assert [name for name, *_ in report["mismatched_keys"]] == ["model.multi_modal_projector.layers.0.weight"]


def test_image_feature_source_and_chat_template(source):
    arguments = {"image_feature_source": ["temporal_avg_pool"], "chat_template": "plain"}
    model, processor = load_pretrained(source, **arguments)
    assert model.config.image_feature_source == ["temporal_avg_pool"]
    assert processor.num_image_tokens == model.config.num_image_tokens
    assert processor.chat_template != load_pretrained(source)[1].chat_template


def test_converted_checkpoint(converted, processor):
    model, loaded = load_pretrained(converted, dtype=torch.float32)
    assert_same_weights(model, AutoModelForImageTextToText.from_pretrained(converted, dtype=torch.float32))
    assert without_auto_map(loaded.to_dict()) == without_auto_map(processor.to_dict())
    with pytest.raises(CheckpointError, match="not an original checkpoint"):
        load_pretrained(converted, vision_tower=LLAMA.vision_tower)


def test_adapter_of_peft(source, tmp_path):
    """An adapter names its base, which may be an original."""
    model, processor = load_pretrained(source, dtype=torch.float32)
    lora = LoraConfig(target_modules=r".*language_model.*\.o_proj", init_lora_weights=False)
    wrapped = get_peft_model(model, lora).eval()
    wrapped.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, _ = load_pretrained(tmp_path, dtype=torch.float32)
    input_ids = torch.arange(3, 12)[None]
    assert_close(loaded.eval()(input_ids=input_ids).logits, wrapped(input_ids=input_ids).logits)
    with wrapped.disable_adapter():
        assert not torch.allclose(wrapped(input_ids=input_ids).logits, loaded(input_ids=input_ids).logits)


def test_is_original(original, converted, tmp_path):
    assert is_original(original) and not is_original(converted)
    assert not is_original(tmp_path)
    with pytest.raises(CheckpointError, match="nothing is neither a directory nor"):
        is_original(tmp_path / "nothing")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json cannot be read as JSON"):
        is_original(tmp_path)


def test_other_models_are_loaded_and_saved_as_before(original, tmp_path):
    """Loading an original leaves nothing behind in Transformers' tables."""
    load_original(original)
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert names_in(tmp_path) == set(model.state_dict())
    assert_close(AutoModelForImageTextToText.from_pretrained(tmp_path).state_dict(), model.state_dict())


def test_llava_is_refused_by_name(original, tmp_path):
    config = json.loads((original / "config.json").read_text())
    llava = {**config, "mm_vision_tower": "openai/clip-vit-large-patch14-336"}
    (tmp_path / "config.json").write_text(json.dumps(llava))
    with pytest.raises(CheckpointError, match="clip-vit-large-patch14-336.*is a LLaVA, not a Florence-VL"):
        load_pretrained(tmp_path)


def test_damaged_checkpoint_is_an_error(original, tmp_path):
    directory = shutil.copytree(original, tmp_path / "damaged")
    shard = directory / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="model-00002-of-00002.safetensors is damaged"):
        load_original(directory)


OTHER_LLAVA = """
from transformers import AutoConfig, LlamaConfig

class LlavaConfig(LlamaConfig):
    model_type = "llava_llama"

AutoConfig.register("llava_llama", LlavaConfig)
"""


@pytest.mark.parametrize(
    "imports", [OTHER_LLAVA + "import florence_vl_hf", "import florence_vl_hf" + OTHER_LLAVA], ids=["before", "after"]
)
def test_model_types_of_other_packages_are_left_alone(imports, tmp_path):
    """Somebody's `llava_llama` keeps working, registered before or after this package is imported."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava_llama", "hidden_size": 48}))
    check = f"""
config = AutoConfig.from_pretrained({str(tmp_path)!r})
assert type(config) is LlavaConfig and config.hidden_size == 48, config
"""
    subprocess.run([sys.executable, "-c", imports + check], check=True)
