# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText

from florence_vl_hf.conversion import CheckpointError, convert
from florence_vl_hf.conversion.key_mapping import to_converted

from .conftest import LLAMA, all_tensors, edit_shard, remove_weights


class TestWeights:
    def test_every_used_tensor_is_there_bit_by_bit(self, golden, converted):
        original, ours = all_tensors(golden.checkpoint), all_tensors(converted)
        used = set()
        for name, tensor in original.items():
            mapped = to_converted(name)
            if mapped.name is not None:
                used.add(mapped.name)
                expected = tensor.T if mapped.transposed else tensor
                assert ours[mapped.name].dtype == torch.bfloat16
                assert ours[mapped.name][: expected.shape[0]].equal(expected), name
        assert used == set(ours)

    def test_transformers_finds_nothing_missing_and_nothing_too_much(self, converted):
        _, report = AutoModelForImageTextToText.from_pretrained(converted, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]

    def test_shards_hold_the_same_as_one_file(self, golden, converted, tmp_path):
        convert(golden.checkpoint, tmp_path / "sharded", golden.vision_tower, max_shard_size="500KB")
        shards = sorted((tmp_path / "sharded").glob("model-*-of-*.safetensors"))
        assert len(shards) >= 3
        assert max(shard.stat().st_size for shard in shards) < 1_300_000  # the embedding table alone is 1.2 MB
        assert_close(all_tensors(tmp_path / "sharded"), all_tensors(converted), rtol=0, atol=0)
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / "sharded", dtype=torch.bfloat16)
        loaded = AutoModelForImageTextToText.from_pretrained(converted, dtype=torch.bfloat16)
        assert_close(model.state_dict(), loaded.state_dict(), rtol=0, atol=0)

    def test_dtype(self, tmp_path):
        convert(LLAMA.checkpoint, tmp_path / "half", LLAMA.vision_tower, dtype=torch.float16)
        assert {tensor.dtype for tensor in all_tensors(tmp_path / "half").values()} == {torch.float16}
        assert AutoModelForImageTextToText.from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.float16

    def test_pytorch_files(self, llama_copy, tmp_path):
        index_file = llama_copy / "model.safetensors.index.json"
        weight_map = json.loads(index_file.read_text())["weight_map"]
        index_file.unlink()
        for shard in llama_copy.glob("*.safetensors"):
            torch.save(load_file(shard), shard.with_suffix(".bin"))
            shard.unlink()
        weight_map = {name: shard.replace(".safetensors", ".bin") for name, shard in weight_map.items()}
        (llama_copy / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
        convert(llama_copy, tmp_path / "from-bin", LLAMA.vision_tower)
        convert(LLAMA.checkpoint, tmp_path / "from-safetensors", LLAMA.vision_tower)
        assert_close(all_tensors(tmp_path / "from-bin"), all_tensors(tmp_path / "from-safetensors"))


class TestRefusals:
    def refuse(self, source: Path, output: Path, message: str, vision_tower: Path | None = LLAMA.vision_tower) -> None:
        with pytest.raises(CheckpointError, match=message):
            convert(source, output, vision_tower)
        assert not output.exists()
        assert [path for path in output.parent.iterdir() if "incomplete" in path.name] == []

    def test_broken_json(self, llama_copy, tmp_path):
        (llama_copy / "config.json").write_text("{")
        self.refuse(llama_copy, tmp_path / "out", "config.json cannot be read as JSON")

    def test_tensor_that_the_index_promised(self, llama_copy, tmp_path):
        name = "model.layers.0.self_attn.q_proj.weight"
        edit_shard(llama_copy, lambda tensors: tensors.pop(name), with_index=False)
        self.refuse(llama_copy, tmp_path / "out", f"{name} is in model-00001-of-00002.safetensors, but it is not")

    def test_truncated_shard(self, llama_copy, tmp_path):
        shard = llama_copy / "model-00002-of-00002.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1000])
        self.refuse(llama_copy, tmp_path / "out", "model-00002-of-00002.safetensors is damaged or incomplete")

    def test_missing_shard(self, llama_copy, tmp_path):
        (llama_copy / "model-00002-of-00002.safetensors").unlink()
        self.refuse(llama_copy, tmp_path / "out", "names the file model-00002-of-00002.safetensors, which is not in")

    @pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "a\\b.safetensors", ".."])
    def test_shard_outside_of_the_directory(self, shard, llama_copy, tmp_path):
        index_file = llama_copy / "model.safetensors.index.json"
        index_file.write_text(json.dumps({"weight_map": {"lm_head.weight": shard}}))
        self.refuse(llama_copy, tmp_path / "out", "which is not in")

    def test_pickle_that_runs_code(self, llama_copy, tmp_path):
        remove_weights(llama_copy)
        torch.save({"lm_head.weight": _RunsCode(str(tmp_path / "ran"))}, llama_copy / "pytorch_model.bin")
        self.refuse(llama_copy, tmp_path / "out", "would run code")
        assert not (tmp_path / "ran").exists()

    def test_what_is_neither_directory_nor_id(self, tmp_path):
        self.refuse(tmp_path / "nothing", tmp_path / "out", "neither a directory nor the id")

    def test_existing_output_is_never_overwritten(self, tmp_path):
        output = tmp_path / "out"
        output.mkdir()
        (output / "mine.txt").write_text("mine")
        with pytest.raises(CheckpointError, match="exists already"):
            convert(LLAMA.checkpoint, output, LLAMA.vision_tower)
        assert [file.name for file in output.iterdir()] == ["mine.txt"]

    def test_full_disk_is_reported_before_anything_is_written(self, tmp_path, monkeypatch):
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        self.refuse(LLAMA.checkpoint, tmp_path / "out", "0.0 GiB free")

    def test_empty_path(self, tmp_path):
        self.refuse("", tmp_path / "out", "empty path")


class _RunsCode:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (Path(self.path),)
