# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import GenerationConfig

from florence_vl_hf.conversion import CheckpointError, convert, read_original

from .conftest import LLAMA, all_tensors, edit_shard, remove_weights


def _embedding_tables(tensors: dict[str, torch.Tensor]) -> list[str]:
    return [name for name, tensor in tensors.items() if tensor.shape[0] == 51289]


class TestTowerWeights:
    @pytest.mark.parametrize("name", ["model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens"])
    def test_tied_embedding_table_under_any_of_its_names(self, name, llama_copy):
        table = torch.randn(51289, 8).bfloat16()
        for number in (1, 2):  # whatever names it has here
            edit_shard(llama_copy, lambda tensors: [tensors.pop(n) for n in _embedding_tables(tensors)], number)
        with pytest.raises(CheckpointError, match="missing: .*language_model.model.shared.weight"):
            read_original(llama_copy, vision_tower=LLAMA.vision_tower)
        name = f"model.vision_tower.vision_tower.language_model.{name}.weight"
        edit_shard(llama_copy, lambda tensors: tensors.update({name: table}))
        checkpoint = read_original(llama_copy, vision_tower=LLAMA.vision_tower)
        assert checkpoint.tensors["model.vision_tower.encoder.embed_tokens.weight"].load().equal(table)

    def test_weights_of_the_checkpoint_take_precedence(self, phi_copy):
        in_checkpoint = torch.randn(12).bfloat16()
        name = "model.vision_tower.vision_tower.image_proj_norm.weight"
        edit_shard(phi_copy, lambda tensors: tensors.update({name: in_checkpoint}))
        made = read_original(phi_copy).tensors["model.vision_tower.image_projector.image_proj_norm.weight"].load()
        assert made.equal(in_checkpoint)

    def test_weights_of_the_directory_are_used_if_the_checkpoint_has_none(self, phi_copy):
        tensors = {name: tensor for name, tensor in all_tensors(phi_copy).items() if "vision_tower" not in name}
        remove_weights(phi_copy)
        save_file(tensors, phi_copy / "model.safetensors")
        tower = torch.load(phi_copy / "vision_tower" / "pytorch_model.bin", weights_only=True)
        projection = read_original(phi_copy).tensors["model.vision_tower.image_projector.image_projection.weight"]
        assert projection.load().equal(tower["image_projection"].T)


def test_added_rows_are_zero_in_any_dtype():
    plain = read_original(LLAMA.checkpoint, vision_tower=LLAMA.vision_tower)
    cast = read_original(LLAMA.checkpoint, vision_tower=LLAMA.vision_tower, dtype=torch.float32)
    assert plain.num_added_rows == cast.num_added_rows == 30
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        assert not plain.tensors[name].load()[-30:].any()
        assert cast.tensors[name].load().equal(plain.tensors[name].load().float())


class TestGenerationConfig:
    def test_sampling_flags_without_effect_are_dropped(self, llama_copy, tmp_path):
        """As in Vicuna's generation_config.json, which Transformers loads but does not save."""
        settings = {"_from_model_config": True, "temperature": 0.9, "top_p": 0.6, "eos_token_id": 474}
        (llama_copy / "generation_config.json").write_text(json.dumps(settings))
        convert(llama_copy, tmp_path / "out", LLAMA.vision_tower)
        generation_config = GenerationConfig.from_pretrained(tmp_path / "out")
        assert generation_config.eos_token_id == 474 and generation_config.pad_token_id == 481
        assert not generation_config.do_sample and generation_config.temperature in (None, 1.0)

    def test_sampling_that_was_asked_for_is_kept(self, llama_copy, tmp_path):
        settings = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
        (llama_copy / "generation_config.json").write_text(json.dumps(settings))
        convert(llama_copy, tmp_path / "out", LLAMA.vision_tower)
        generation_config = GenerationConfig.from_pretrained(tmp_path / "out")
        assert (generation_config.do_sample, generation_config.temperature) == (True, 0.6)


class TestRefusals:
    def refuse(self, source, message):
        with pytest.raises(CheckpointError, match=message):
            read_original(source, vision_tower=LLAMA.vision_tower)

    def test_missing_tensor(self, llama_copy):
        name = "model.layers.0.self_attn.q_proj.weight"
        edit_shard(llama_copy, lambda tensors: tensors.pop(name))
        self.refuse(llama_copy, f"missing: {name}")

    def test_unknown_tensor(self, llama_copy):
        edit_shard(llama_copy, lambda tensors: tensors.update({"model.image_newline": torch.zeros(64)}))
        self.refuse(llama_copy, "nothing uses: model.image_newline in model-00001-of-00002.safetensors")

    def test_misshapen_tensor(self, llama_copy):
        name = "model.vision_tower.vision_tower.image_projection"
        edit_shard(llama_copy, lambda tensors: tensors.update({name: torch.zeros(8, 96)}))
        self.refuse(llama_copy, rf"transpose of {name} in .* has shape \(96, 8\), expected \(8, 96\)")

    @pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight"])
    def test_integer_weights(self, name, llama_copy):
        for number in (1, 2):
            edit_shard(
                llama_copy,
                lambda tensors: tensors.update({n: tensors[n].int() for n in tensors if n == name}),
                number,
            )
        self.refuse(llama_copy, f"{name} in .* has dtype torch.int32, expected floating-point")

    def test_no_weights(self, llama_copy):
        remove_weights(llama_copy)
        self.refuse(llama_copy, "holds no weights")
