# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from florence_vl_hf.conversion import CheckpointError, convert, load_pretrained
from florence_vl_hf.training import merge_adapter

from .conftest import LLAMA, PHI


# What PEFT calls the tower's language model.
TOWER_LORA = "base_model.model.model.vision_tower.vision_tower.language_model.model"


def random_projector(prefix: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    stored = load_file(LLAMA.checkpoint / "model-00001-of-00002.safetensors")
    stored |= load_file(LLAMA.checkpoint / "model-00002-of-00002.safetensors")
    return {
        prefix + name.removeprefix("model."): torch.randn(tensor.shape, generator=generator).bfloat16()
        for name, tensor in stored.items()
        if name.startswith("model.mm_projector.")
    }


@pytest.fixture(scope="module", params=["original", "converted"])
def base(request, tmp_path_factory) -> Path:
    """The base of an adapter, in either layout."""
    directory = tmp_path_factory.mktemp("base") / "base"
    if request.param == "converted":
        convert(LLAMA.checkpoint, directory, LLAMA.vision_tower)
        return directory
    shutil.copytree(LLAMA.checkpoint, directory)
    shutil.copytree(LLAMA.vision_tower, directory / "vision_tower")
    return directory


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[str, torch.Tensor]:
    """The base, converted without any adapter."""
    directory = tmp_path_factory.mktemp("plain") / "plain"
    convert(LLAMA.checkpoint, directory, LLAMA.vision_tower)
    return tensors_of(directory)


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_projector_alone(prefix, base, plain, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    projector = random_projector(prefix)
    torch.save(projector, adapter / "mm_projector.bin")
    convert(adapter, tmp_path / "out", base=base)
    made = tensors_of(tmp_path / "out")
    assert made["model.multi_modal_projector.layers.1.weight"].equal(
        projector[prefix + "mm_projector.encoder_mlp.1.1.weight"]
    )
    same = [name for name in plain if "multi_modal_projector" not in name]
    assert_close({n: made[n] for n in same}, {n: plain[n] for n in same}, rtol=0, atol=0)
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "out").config.image_size == 96


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 32}}])
def test_lora_is_merged_as_peft_merges_it(settings, base, tmp_path):
    """The truth comes from PEFT over the language model alone, as the original trained it."""
    converted = load_pretrained(base, dtype=torch.float32)[0]
    llm = AutoModelForCausalLM.from_config(converted.config.text_config)
    llm.model.load_state_dict(converted.model.language_model.state_dict())
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "gate_proj"], **settings)
    torch.manual_seed(0)
    wrapped = get_peft_model(llm, lora)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapter = tmp_path / "adapter"
    wrapped.save_pretrained(adapter)
    projector = random_projector("base_model.model.model.")
    torch.save(projector, adapter / "non_lora_trainables.bin")
    shutil.copy(LLAMA.checkpoint / "config.json", adapter)

    convert(adapter, tmp_path / "out", base=base, dtype=torch.float32)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    merged = wrapped.merge_and_unload()
    assert_close(model.model.language_model.state_dict(), merged.model.state_dict())
    assert not torch.allclose(
        model.model.language_model.layers[0].self_attn.q_proj.weight,
        converted.model.language_model.layers[0].self_attn.q_proj.weight,
    )
    name = "base_model.model.model.mm_projector.encoder_mlp.0.bias"
    assert_close(model.model.multi_modal_projector.layers[0].bias.data, projector[name].float())


def write_lora_of_the_tower(directory: Path, lora_alpha: float | None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for part in ("encoder", "decoder"):
        for half, shape in (("A", (2, 8)), ("B", (8, 2))):
            name = f"{TOWER_LORA}.{part}.layers.0.self_attn.q_proj.lora_{half}.weight"
            tensors[name] = torch.randn(shape, generator=generator)
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": lora_alpha}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return tensors


def test_lora_of_the_tower(tmp_path, plain):
    """PEFT matches layers by suffix, so it wraps Florence-2's encoder and its decoder, which is not built here."""
    adapter = tmp_path / "adapter"
    tensors = write_lora_of_the_tower(adapter, lora_alpha=4)
    convert(adapter, tmp_path / "out", LLAMA.vision_tower, base=LLAMA.checkpoint)
    merged = tensors_of(tmp_path / "out")
    name = "model.vision_tower.encoder.layers.0.self_attn.q_proj.weight"
    down, up = (tensors[f"{TOWER_LORA}.encoder.layers.0.self_attn.q_proj.lora_{half}.weight"] for half in "AB")
    assert merged[name].equal((plain[name].float() + 2 * up @ down).bfloat16())
    assert [other for other in plain if not plain[other].equal(merged[other])] == [name]


class TestRefusals:
    @pytest.fixture
    def adapter(self, tmp_path) -> Path:
        directory = tmp_path / "adapter"
        directory.mkdir()
        shutil.copy(LLAMA.checkpoint / "config.json", directory)
        torch.save(random_projector("model."), directory / "mm_projector.bin")
        return directory

    def test_adapter_without_its_base(self, adapter, tmp_path):
        with pytest.raises(CheckpointError, match="give its base model as --base"):
            convert(adapter, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_adapter_of_another_model(self, adapter, tmp_path):
        with pytest.raises(CheckpointError, match="adapter is of another model"):
            convert(adapter, tmp_path / "out", base=PHI.checkpoint)

    def test_directory_without_an_adapter(self, adapter, tmp_path):
        """Neither the base alone nor a complete model in its place is what was asked for."""
        for source in (PHI.checkpoint, tmp_path):
            with pytest.raises(CheckpointError, match="not a projector or LoRA checkpoint"):
                convert(source, tmp_path / "out", LLAMA.vision_tower, base=LLAMA.checkpoint)
        assert not (tmp_path / "out").exists()

    def test_tensor_that_no_model_has(self, adapter, tmp_path):
        torch.save({"model.mm_resampler.weight": torch.zeros(2)}, adapter / "mm_projector.bin")
        with pytest.raises(CheckpointError, match="not a weight of a Florence-VL"):
            convert(adapter, tmp_path / "out", LLAMA.vision_tower, base=LLAMA.checkpoint)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"use_dora": True}, "use_dora"),
            ({"bias": "all"}, "bias"),
            ({"peft_type": "IA3"}, "peft_type"),
        ],
    )
    def test_lora_that_cannot_be_merged(self, settings, message, adapter, tmp_path):
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **settings}
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=message):
            convert(adapter, tmp_path / "out", LLAMA.vision_tower, base=LLAMA.checkpoint)

    @pytest.mark.parametrize("field", ["alpha_pattern", "rank_pattern"])
    def test_pattern_that_can_take_for_ever(self, field, base, tmp_path):
        """PEFT matches patterns as regular expressions: this one takes hours."""
        write_lora_of_the_tower(tmp_path / "adapter", lora_alpha=4)
        file = tmp_path / "adapter" / "adapter_config.json"
        pattern = {"(" + "(.+)+" * 9 + ")+x": 2}
        file.write_text(
            json.dumps(json.loads(file.read_text()) | {field: pattern, "base_model_name_or_path": str(base)})
        )
        with pytest.raises(CheckpointError, match=f"{field} .*plain names"):
            convert(tmp_path / "adapter", tmp_path / "out", base=base)
        with pytest.raises(CheckpointError, match=f"{field} .*plain names"):
            load_pretrained(tmp_path / "adapter")
        with pytest.raises(CheckpointError, match=f"{field} .*plain names"):
            merge_adapter(tmp_path / "adapter", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_integer_weights(self, adapter, tmp_path):
        projector = {name: tensor.int() for name, tensor in random_projector("model.").items()}
        torch.save(projector, adapter / "mm_projector.bin")
        with pytest.raises(CheckpointError, match="mm_projector.bin is not"):
            convert(adapter, tmp_path / "out", LLAMA.vision_tower, base=LLAMA.checkpoint)

    @pytest.mark.parametrize("lora_alpha", [None, float("nan")])
    def test_lora_without_a_scaling(self, lora_alpha, tmp_path):
        write_lora_of_the_tower(tmp_path / "adapter", lora_alpha)
        with pytest.raises(CheckpointError, match="lora_alpha"):
            convert(tmp_path / "adapter", tmp_path / "out", LLAMA.vision_tower, base=LLAMA.checkpoint)
