# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

from florence_vl_hf import (
    FlorenceVLConfig,
    FlorenceVLForConditionalGeneration,
    FlorenceVLModel,
    FlorenceVLProcessor,
)
from florence_vl_hf.conversion import CheckpointError

from ..conftest import FIXTURES, tiny_model


@pytest.fixture(scope="module")
def original(golden, tmp_path_factory) -> Path:
    """An original checkpoint with its tower's folder inside, as after pretraining."""
    folder = tmp_path_factory.mktemp("original") / golden.folder.name
    shutil.copytree(golden.checkpoint, folder)
    if golden.vision_tower is not None:
        shutil.copytree(golden.vision_tower, folder / "vision_tower")
    return folder


def names_in(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())


@pytest.mark.parametrize(
    "model_class", [FlorenceVLForConditionalGeneration, AutoModelForImageTextToText, AutoModelForMultimodalLM]
)
def test_same_model_as_after_a_conversion(model_class, original, converted, tmp_path):
    direct, report = model_class.from_pretrained(original, output_loading_info=True)
    assert type(direct) is FlorenceVLForConditionalGeneration
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    expected = AutoModelForImageTextToText.from_pretrained(converted)
    assert_close(direct.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert direct.generation_config.to_dict() == expected.generation_config.to_dict()

    direct.save_pretrained(tmp_path)
    assert names_in(tmp_path) == names_in(converted)
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert_close(saved.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert saved.config.model_type == "florence_vl"


def test_base_model(original, converted):
    direct = AutoModel.from_pretrained(original)
    assert type(direct) is FlorenceVLModel
    assert_close(direct.state_dict(), AutoModel.from_pretrained(converted).state_dict(), rtol=0, atol=0)


def test_configuration(original, converted):
    config = AutoConfig.from_pretrained(original)
    assert type(config) is FlorenceVLConfig
    expected = AutoConfig.from_pretrained(converted)
    # Remote code and the folder are the converted one's own.
    own = {"auto_map", "_name_or_path"}
    assert {k: v for k, v in config.to_dict().items() if k not in own} == {
        k: v for k, v in expected.to_dict().items() if k not in own
    }
    ablation = FlorenceVLConfig.from_pretrained(original, fusion_features=["image"], fusion_strategy="average")
    assert (ablation.fusion_features, ablation.fusion_strategy) == (["image"], "average")


def test_processor(original, processor):
    for processor_class in (AutoProcessor, FlorenceVLProcessor):
        direct = processor_class.from_pretrained(original)
        assert type(direct) is FlorenceVLProcessor
        assert direct.to_dict() == processor.to_dict()
        assert direct.chat_template == processor.chat_template
        assert direct.tokenizer.get_vocab() == processor.tokenizer.get_vocab()


def test_arguments_of_from_pretrained(original):
    model = AutoModelForImageTextToText.from_pretrained(original, dtype=torch.float32, attn_implementation="eager")
    assert model.dtype == torch.float32
    assert model.model.language_model.config._attn_implementation == "eager"


def test_other_models_are_loaded_and_saved_as_before(original, tmp_path):
    """Loading an original leaves nothing behind in Transformers' tables."""
    AutoModelForImageTextToText.from_pretrained(original)
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert names_in(tmp_path) == set(model.state_dict())
    assert_close(AutoModelForImageTextToText.from_pretrained(tmp_path).state_dict(), model.state_dict())


@pytest.mark.parametrize("auto_class", [AutoConfig, AutoModelForImageTextToText])
def test_llava_is_refused_by_name(auto_class, original, tmp_path):
    config = json.loads((original / "config.json").read_text())
    llava = {**config, "mm_vision_tower": "openai/clip-vit-large-patch14-336"}
    (tmp_path / "config.json").write_text(json.dumps(llava))
    with pytest.raises(CheckpointError, match="clip-vit-large-patch14-336.*is a LLaVA, not a Florence-VL"):
        auto_class.from_pretrained(tmp_path)


def test_damaged_checkpoint_is_an_error(original, tmp_path):
    folder = shutil.copytree(original, tmp_path / "damaged")
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="model-00002-of-00002.safetensors is damaged"):
        AutoModelForImageTextToText.from_pretrained(folder)


def test_tower_whose_weights_are_apart_is_an_error(tmp_path):
    """Transformers would load the shards alone, and leave the tower at random."""
    folder = Path(shutil.copytree(FIXTURES / "phi-small" / "checkpoint", tmp_path / "original"))
    shards = sorted(folder.glob("*.safetensors"))
    tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    for file in [*shards, folder / "model.safetensors.index.json"]:
        file.unlink()
    save_file({n: t for n, t in tensors.items() if "vision_tower" not in n}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="not all of its weights in one place.*florence-vl convert"):
        AutoModelForImageTextToText.from_pretrained(folder)
