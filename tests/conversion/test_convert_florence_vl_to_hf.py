# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, GenerationConfig

from florence_vl_hf.conversion import CheckpointError, convert, plan_conversion
from florence_vl_hf.conversion.key_mapping import to_converted

from ..conftest import FIXTURES, Golden


LLAMA = Golden(FIXTURES / "llama-small")
PHI = Golden(FIXTURES / "phi-small")


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for shard in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(shard).items()
    }


def _tables(tensors: dict[str, torch.Tensor]) -> list[str]:
    return [name for name, tensor in tensors.items() if tensor.shape[0] == 51289]


@pytest.fixture
def llama_copy(tmp_path: Path) -> Path:
    """An original checkpoint to spoil."""
    return Path(shutil.copytree(LLAMA.checkpoint, tmp_path / "original"))


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def edit_shard(
    folder: Path, edit: Callable[[dict[str, torch.Tensor]], None], number: int = 1, with_index: bool = True
) -> None:
    """Change the tensors of a shard, and the index with them."""
    shard = folder / f"model-0000{number}-of-00002.safetensors"
    tensors = load_file(shard)
    before = set(tensors)
    edit(tensors)
    save_file(tensors, shard, metadata={"format": "pt"})
    if with_index:
        index_file = folder / "model.safetensors.index.json"
        index = json.loads(index_file.read_text())
        for name in before - set(tensors):
            del index["weight_map"][name]
        index["weight_map"] |= dict.fromkeys(tensors, shard.name)
        index_file.write_text(json.dumps(index))


class TestWeights:
    def test_every_used_tensor_is_there_bit_by_bit(self, golden, converted):
        original, ours = stored_tensors(golden.checkpoint), stored_tensors(converted)
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
        assert max(shard.stat().st_size for shard in shards) < 1_300_000  # the table of words alone is 1.2 MB
        assert_close(stored_tensors(tmp_path / "sharded"), stored_tensors(converted), rtol=0, atol=0)
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / "sharded", dtype=torch.bfloat16)
        loaded = AutoModelForImageTextToText.from_pretrained(converted, dtype=torch.bfloat16)
        assert_close(model.state_dict(), loaded.state_dict(), rtol=0, atol=0)

    def test_dtype(self, tmp_path):
        convert(LLAMA.checkpoint, tmp_path / "half", LLAMA.vision_tower, dtype=torch.float16)
        assert {tensor.dtype for tensor in stored_tensors(tmp_path / "half").values()} == {torch.float16}
        assert AutoModelForImageTextToText.from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.float16

    @pytest.mark.parametrize("name", ["model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens"])
    def test_table_of_words_under_any_of_its_names(self, name, llama_copy):
        table = torch.randn(51289, 8).bfloat16()
        for number in (1, 2):  # whatever names it has here
            edit_shard(llama_copy, lambda tensors: [tensors.pop(n) for n in _tables(tensors)], number)
        with pytest.raises(CheckpointError, match="missing: .*language_model.model.shared.weight"):
            plan_conversion(llama_copy, LLAMA.vision_tower)
        name = f"model.vision_tower.vision_tower.language_model.{name}.weight"
        edit_shard(llama_copy, lambda tensors: tensors.update({name: table}))
        plan = plan_conversion(llama_copy, LLAMA.vision_tower)
        assert plan.tensors["model.vision_tower.encoder.embed_tokens.weight"].make().equal(table)

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
        assert_close(stored_tensors(tmp_path / "from-bin"), stored_tensors(tmp_path / "from-safetensors"))


class TestVocabulary:
    def test_every_token_keeps_its_id(self, golden, processor, tmp_path):
        # Apart from its config.json, whose model type Transformers does not know.
        for file in golden.checkpoint.glob("*token*"):
            shutil.copy(file, tmp_path)
        original = AutoTokenizer.from_pretrained(tmp_path).get_vocab()
        assert original.items() <= processor.tokenizer.get_vocab().items()
        assert processor.image_token_id not in original.values()

    def test_free_row_or_new_rows_up_to_a_multiple_of_64(self, processor, model, golden):
        rows = model.config.text_config.vocab_size
        named = {"llama-small": (482, 512), "phi-small": (575, 576)}
        assert (processor.image_token_id, rows) == named[golden.folder.name]
        assert model.get_input_embeddings().weight.shape[0] == model.lm_head.weight.shape[0] == rows

    def test_rows_without_a_word_are_never_generated(self, processor, model):
        never = [model.config.image_token_id, *(model.generation_config.suppress_tokens or [])]
        inputs = processor(text="Hi", return_tensors="pt")
        output = model.generate(
            **inputs, max_new_tokens=4, do_sample=True, output_scores=True, return_dict_in_generate=True
        )
        for scores in output.scores:
            assert (scores[:, never] == -torch.inf).all()
        last_named = max(processor.tokenizer.get_vocab().values())
        assert set(range(last_named + 1, model.config.text_config.vocab_size)) <= set(never)


class TestTower:
    def test_settings_of_the_folder(self):
        plan = plan_conversion(PHI.checkpoint)
        assert plan.assumptions == []
        assert plan.config.image_size == 160
        assert plan.config.vision_config.text_config.encoder_attention_heads == 3
        assert plan.config.num_image_tokens == plan.processor.num_image_tokens == 26

    def test_without_its_folder_sizes_come_from_the_weights_and_it_is_said(self):
        told = plan_conversion(LLAMA.checkpoint, LLAMA.vision_tower).config.vision_config
        plan = plan_conversion(LLAMA.checkpoint)
        guessed = plan.config.vision_config
        for name in (
            "embed_dim",
            "depths",
            "patch_size",
            "patch_prenorm",
            "projection_dim",
            "max_position_embeddings",
        ):
            assert list(_listed(guessed.vision_config, name)) == list(_listed(told.vision_config, name)), name
        for name in ("vocab_size", "d_model", "encoder_layers", "encoder_ffn_dim", "max_position_embeddings"):
            assert getattr(guessed.text_config, name) == getattr(told.text_config, name), name
        assert plan.config.image_size == 768
        assert len(plan.assumptions) == 2
        assert "--vision-tower" in plan.assumptions[0] and "--image-feature-source" in plan.assumptions[1]

    @pytest.mark.parametrize(("source", "num_image_tokens"), [(["temporal_avg_pool"], 9), (["last_frame"], 9)])
    def test_image_feature_source_can_be_overridden(self, source, num_image_tokens, tmp_path):
        plan = convert(LLAMA.checkpoint, tmp_path / "out", LLAMA.vision_tower, image_feature_source=source)
        assert plan.config.num_image_tokens == num_image_tokens
        processor = AutoProcessor.from_pretrained(tmp_path / "out")
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
        inputs = processor(images=LLAMA.image("odd.jpg"), text="<image>Hi", return_tensors="pt")
        assert inputs["input_ids"].eq(processor.image_token_id).sum() == num_image_tokens
        assert torch.isfinite(model(**inputs).logits).all()

    def test_weights_of_the_checkpoint_win_over_those_of_the_folder(self, tmp_path):
        folder = Path(shutil.copytree(PHI.checkpoint, tmp_path / "original"))
        in_checkpoint = torch.randn(12).bfloat16()
        name = "model.vision_tower.vision_tower.image_proj_norm.weight"
        edit_shard(folder, lambda tensors: tensors.update({name: in_checkpoint}))
        made = plan_conversion(folder).tensors["model.vision_tower.image_projector.image_proj_norm.weight"].make()
        assert made.equal(in_checkpoint)

    def test_weights_of_the_folder_serve_where_the_checkpoint_has_none(self, tmp_path):
        folder = Path(shutil.copytree(PHI.checkpoint, tmp_path / "original"))
        index_file = folder / "model.safetensors.index.json"
        index_file.unlink()
        tensors = {n: t for n, t in stored_tensors(folder).items() if "vision_tower" not in n}
        for shard in folder.glob("*.safetensors"):
            shard.unlink()
        save_file(tensors, folder / "model.safetensors")
        plan = plan_conversion(folder)
        in_folder = torch.load(folder / "vision_tower" / "pytorch_model.bin", weights_only=True)
        made = plan.tensors["model.vision_tower.image_projector.image_projection.weight"].make()
        assert made.equal(in_folder["image_projection"].T)

    def test_folder_of_another_layout(self, tmp_path):
        vision_config = plan_conversion(PHI.checkpoint).config.vision_config
        vision_config.save_pretrained(tmp_path)
        shutil.copy(PHI.checkpoint / "vision_tower" / "preprocessor_config.json", tmp_path)
        plan = plan_conversion(PHI.checkpoint, tmp_path)
        assert plan.config.vision_config.vision_config.to_dict() == vision_config.vision_config.to_dict()
        assert len(plan.assumptions) == 1 and "--image-feature-source" in plan.assumptions[0]


def _listed(config: Any, name: str) -> Any:
    value = getattr(config, name)
    return value if isinstance(value, list | tuple) else [value]


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


class TestPictures:
    @pytest.mark.parametrize(("aspect_ratio", "do_pad"), [("pad", True), ("square", False), (None, False)])
    def test_padded_after_finetuning_only(self, aspect_ratio, do_pad, llama_copy):
        edit_config(llama_copy, image_aspect_ratio=aspect_ratio)
        assert plan_conversion(llama_copy, LLAMA.vision_tower).processor.image_processor.do_pad is do_pad


class TestRefusals:
    def refuse(self, source: Path, output: Path, message: str, vision_tower: Path | None = LLAMA.vision_tower) -> None:
        with pytest.raises(CheckpointError, match=message):
            convert(source, output, vision_tower)
        assert not output.exists()
        assert [path for path in output.parent.iterdir() if "incomplete" in path.name] == []

    def test_llava_by_name(self, llama_copy, tmp_path):
        edit_config(llama_copy, mm_vision_tower="openai/clip-vit-large-patch14-336")
        edit_shard(llama_copy, lambda ts: [ts.pop(n) for n in list(ts) if "vision_tower" in n])
        self.refuse(llama_copy, tmp_path / "out", "clip-vit-large-patch14-336.*is a LLaVA, not a Florence-VL")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"model_type": "bert"}, "model type 'bert', expected one of llava_llama"),
            ({"mm_projector_type": "linear"}, "projector of type 'linear'"),
            ({"mm_projector_type": "mlp2x_gelu"}, "layers.2.weight|encoder_mlp.2.1"),
            ({"hidden_size": 32}, "expected .*32"),
            ({"vocab_size": 400}, "names 482 tokens, but .* only 400 rows"),
        ],
    )
    def test_configuration_that_does_not_fit(self, changes, message, llama_copy, tmp_path):
        edit_config(llama_copy, **changes)
        self.refuse(llama_copy, tmp_path / "out", message)

    def test_broken_json(self, llama_copy, tmp_path):
        (llama_copy / "config.json").write_text("{")
        self.refuse(llama_copy, tmp_path / "out", "config.json cannot be read as JSON")

    def test_missing_tensor(self, llama_copy, tmp_path):
        name = "model.layers.0.self_attn.q_proj.weight"
        edit_shard(llama_copy, lambda tensors: tensors.pop(name))
        self.refuse(llama_copy, tmp_path / "out", f"missing: {name}")

    def test_tensor_that_the_index_promised(self, llama_copy, tmp_path):
        name = "model.layers.0.self_attn.q_proj.weight"
        edit_shard(llama_copy, lambda tensors: tensors.pop(name), with_index=False)
        self.refuse(llama_copy, tmp_path / "out", f"{name} is in model-00001-of-00002.safetensors, but it is not")

    def test_unknown_tensor(self, llama_copy, tmp_path):
        edit_shard(llama_copy, lambda tensors: tensors.update({"model.image_newline": torch.zeros(64)}))
        self.refuse(
            llama_copy, tmp_path / "out", "nothing uses: model.image_newline in model-00001-of-00002.safetensors"
        )

    def test_misshapen_tensor(self, llama_copy, tmp_path):
        name = "model.vision_tower.vision_tower.image_projection"
        edit_shard(llama_copy, lambda tensors: tensors.update({name: torch.zeros(8, 96)}))
        self.refuse(llama_copy, tmp_path / "out", rf"{name} in .* has shape \(8, 96\), expected \(96, 8\)")

    def test_truncated_shard(self, llama_copy, tmp_path):
        shard = llama_copy / "model-00002-of-00002.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1000])
        self.refuse(llama_copy, tmp_path / "out", "model-00002-of-00002.safetensors is damaged or cut short")

    def test_missing_shard(self, llama_copy, tmp_path):
        (llama_copy / "model-00002-of-00002.safetensors").unlink()
        self.refuse(llama_copy, tmp_path / "out", "names the file model-00002-of-00002.safetensors, which is not in")

    @pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "a\\b.safetensors", ".."])
    def test_shard_outside_of_the_folder(self, shard, llama_copy, tmp_path):
        index_file = llama_copy / "model.safetensors.index.json"
        index_file.write_text(json.dumps({"weight_map": {"lm_head.weight": shard}}))
        self.refuse(llama_copy, tmp_path / "out", "may lie outside of")

    def test_pickle_that_runs_code(self, tmp_path):
        folder = Path(shutil.copytree(LLAMA.checkpoint, tmp_path / "original"))
        for file in folder.glob("*.safetensors*"):
            file.unlink()
        torch.save({"lm_head.weight": _RunsCode(str(tmp_path / "ran"))}, folder / "pytorch_model.bin")
        self.refuse(folder, tmp_path / "out", "wants to run code")
        assert not (tmp_path / "ran").exists()

    def test_tokenizer_missing_or_broken(self, llama_copy, tmp_path):
        (llama_copy / "tokenizer.json").write_text("{}")
        self.refuse(llama_copy, tmp_path / "out", "tokenizer in .* cannot be loaded")
        (llama_copy / "tokenizer.json").unlink()
        self.refuse(llama_copy, tmp_path / "out", "has no tokenizer.json and no tokenizer.model")

    def test_no_weights(self, llama_copy, tmp_path):
        for file in llama_copy.glob("*.safetensors*"):
            file.unlink()
        self.refuse(llama_copy, tmp_path / "out", "holds no weights")

    def test_what_is_neither_folder_nor_id(self, tmp_path):
        self.refuse(tmp_path / "nothing", tmp_path / "out", "neither a folder nor the id")

    def test_existing_output_is_never_overwritten(self, tmp_path):
        output = tmp_path / "out"
        output.mkdir()
        (output / "mine.txt").write_text("mine")
        with pytest.raises(CheckpointError, match="exists already"):
            convert(LLAMA.checkpoint, output, LLAMA.vision_tower)
        assert [file.name for file in output.iterdir()] == ["mine.txt"]

    def test_full_disk_is_told_before_anything_is_written(self, tmp_path, monkeypatch):
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        self.refuse(LLAMA.checkpoint, tmp_path / "out", "0.0 GiB free")


class _RunsCode:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (Path(self.path),)
