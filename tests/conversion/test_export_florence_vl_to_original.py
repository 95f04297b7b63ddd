# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText, AutoProcessor, Florence2ForConditionalGeneration

from florence_vl_hf import FlorenceVLConfig
from florence_vl_hf.conversion import CheckpointError, convert, export
from florence_vl_hf.conversion.export_florence_vl_to_original import ORIGINAL_TOWER_ID, read_as_original
from florence_vl_hf.conversion.key_mapping import to_converted
from florence_vl_hf.conversion.original_config import (
    TEXT_MODEL_TYPES,
    text_config_from_original,
    text_config_to_original,
    tower_settings_from_directory,
)

from ..conftest import status
from .conftest import LLAMA, PHI, all_tensors
from .test_assemble_florence_vl import save_llm


PHI_TOWER = PHI.checkpoint / "vision_tower"
TOWER = "model.vision_tower.vision_tower."


@pytest.fixture(scope="module")
def exported(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden's checkpoint, converted and exported again."""
    output = tmp_path_factory.mktemp("exported") / converted.name
    export(converted, output, max_shard_size="500KB")
    return output


@pytest.fixture(scope="module")
def again(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export, converted again: with nothing but itself."""
    output = tmp_path_factory.mktemp("again") / exported.name
    convert(exported, output)
    return output


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("llama") / "model"
    convert(LLAMA.checkpoint, output, LLAMA.vision_tower)
    return output


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    """A converted model to change."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = read(path)
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


class TestRoundTrip:
    def test_every_tensor_is_bit_equal(self, converted, again):
        before, after = all_tensors(converted), all_tensors(again)
        assert {tensor.dtype for tensor in before.values()} == {torch.bfloat16}
        assert_close(after, before, rtol=0, atol=0)

    def test_settings_are_equal(self, converted, again):
        for name in ("config.json", "generation_config.json", "processor_config.json"):
            assert read(again / name) == read(converted / name), name
        assert (again / "chat_template.jinja").read_text() == (converted / "chat_template.jinja").read_text()

    def test_token_ids_of_every_dialog_are_equal(self, golden, converted, again):
        before, after = AutoProcessor.from_pretrained(converted), AutoProcessor.from_pretrained(again)
        assert after.tokenizer.get_vocab() == before.tokenizer.get_vocab()
        for token in (
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
            "unk_token_id",
            "padding_side",
            "all_special_ids",
        ):
            assert getattr(after.tokenizer, token) == getattr(before.tokenizer, token), token
        for dialog in range(len(golden.reference["dialogs"])):
            ids = [
                processor.apply_chat_template(golden.messages(dialog), tokenize=True, return_dict=True)["input_ids"]
                for processor in (before, after)
            ]
            assert ids[0] == ids[1]
            text = before.decode(ids[0][0], skip_special_tokens=True)
            assert after.decode(ids[0][0], skip_special_tokens=True) == text

    def test_answers_are_equal(self, golden, converted, again):
        answers = []
        for directory in (converted, again):
            processor, model = (
                AutoProcessor.from_pretrained(directory),
                AutoModelForImageTextToText.from_pretrained(directory),
            )
            inputs = processor(text="<image>Hi", images=golden.image("odd.jpg"), return_tensors="pt")
            answers.append(model.generate(**inputs, max_new_tokens=4, do_sample=False))
        assert answers[0].equal(answers[1])


class TestOriginalFormat:
    def test_tensors_and_names_are_the_goldens(self, golden, exported):
        original, ours = all_tensors(golden.checkpoint), all_tensors(exported)
        used = {name for name in original if to_converted(name).name is not None}
        assert set(ours) == used
        for name in used:
            assert ours[name].dtype == original[name].dtype and ours[name].equal(original[name]), name

    def test_shards_have_an_index(self, exported):
        shards = sorted(path.name for path in exported.glob("*.safetensors"))
        assert len(shards) > 2
        assert sorted(set(read(exported / "model.safetensors.index.json")["weight_map"].values())) == shards

    def test_config_is_the_goldens_except_for_the_tower_id(self, golden, exported):
        original, ours = read(golden.checkpoint / "config.json"), read(exported / "config.json")
        del original["transformers_version"]
        assert ours == original | {"mm_vision_tower": ORIGINAL_TOWER_ID}

    def test_tower_config_has_the_form_of_the_first_release(self, golden, exported):
        directory = golden.vision_tower or golden.checkpoint / "vision_tower"
        original, ours = read(directory / "config.json"), read(exported / "vision_tower" / "config.json")
        assert ours["vision_config"] == original["vision_config"]
        shared = original["text_config"].keys() & ours["text_config"].keys()
        assert {name: ours["text_config"][name] for name in shared} == {
            name: original["text_config"][name] for name in shared
        }
        assert {"d_model", "encoder_layers", "encoder_attention_heads", "decoder_layers", "scale_embedding"} <= shared
        images = read(exported / "vision_tower" / "preprocessor_config.json")
        for name, value in read(directory / "preprocessor_config.json").items():
            assert name in ("auto_map", "_valid_processor_keys") or images[name] == value, name
        settings = tower_settings_from_directory(exported / "vision_tower")
        assert settings.config.to_dict() == tower_settings_from_directory(directory).config.to_dict()
        assert not settings.assumptions

    def test_tokenizer_is_the_originals(self, golden, converted, exported):
        tokenizer = read(exported / "tokenizer.json")
        names = [token["content"] for token in tokenizer["added_tokens"]]
        assert "<image>" not in names and not any("unused_row" in name for name in names)
        merges = tokenizer["model"]["merges"]
        assert merges and all(isinstance(merge, str) for merge in merges)  # tokenizers 0.19 reads no pairs
        assert read(exported / "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"
        by_name = {token["content"]: token for token in read(converted / "tokenizer.json")["added_tokens"]}
        assert tokenizer["added_tokens"] == [by_name[name] for name in names]
        Tokenizer.from_file(str(exported / "tokenizer.json"))

    def test_pytorch_weights(self, copy, llama, tmp_path):
        torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
        (copy / "model.safetensors").unlink()
        for name, source in (("from_pytorch", copy), ("from_safetensors", llama)):
            export(source, tmp_path / name)
        tensors = all_tensors(tmp_path / "from_pytorch")
        assert_close(tensors, all_tensors(tmp_path / "from_safetensors"), rtol=0, atol=0)

    def test_images_resized_without_padding(self, copy, tmp_path):
        edit(copy / "processor_config.json", lambda config: config["image_processor"].update(do_pad=False))
        files = read_as_original(copy).files
        assert files["config.json"]["image_aspect_ratio"] == "square"


class TestDecoder:
    def test_is_read_from_the_vision_tower(self, tmp_path, caplog):
        convert(PHI.checkpoint, tmp_path / "converted")
        tower = tmp_path / "tower"
        tower.mkdir()
        shutil.copy(PHI_TOWER / "config.json", tower)
        stored = torch.load(PHI_TOWER / "pytorch_model.bin", weights_only=True)
        # Unlike the checkpoint's own: its decoder is used, and nothing else.
        doubled = {name: tensor.float() * 2 for name, tensor in stored.items() if "lm_head" not in name}
        save_file(doubled, tower / "model.safetensors")
        export(tmp_path / "converted", tmp_path / "exported", tower)
        assert "start it at random" not in caplog.text
        ours, original = all_tensors(tmp_path / "exported"), all_tensors(PHI.checkpoint)
        assert set(ours) == set(original)
        for name, tensor in original.items():
            assert ours[name].dtype == tensor.dtype
            assert ours[name].equal(tensor * 2 if ".decoder." in name else tensor), name
        config = read(tmp_path / "exported" / "vision_tower" / "config.json")
        assert config["auto_map"] == read(PHI_TOWER / "config.json")["auto_map"]
        assert config["text_config"]["num_beams"] == 3

    def test_is_read_from_transformers_florence_2(self, llama, tmp_path):
        config = FlorenceVLConfig.from_pretrained(llama).vision_config
        torch.manual_seed(0)
        florence = Florence2ForConditionalGeneration(config)
        florence.save_pretrained(tmp_path / "tower")
        export(llama, tmp_path / "exported", tmp_path / "tower")
        ours = all_tensors(tmp_path / "exported")
        original = all_tensors(LLAMA.checkpoint)
        assert set(original) - set(ours) == {TOWER + "language_model.final_logits_bias"}  # zeros
        name = "decoder.layers.0.encoder_attn.k_proj.weight"
        expected = florence.model.language_model.get_parameter(name).bfloat16()
        assert ours[f"{TOWER}language_model.model.{name}"].equal(expected)

    def test_missing_decoder_is_a_warning(self, llama, tmp_path, caplog):
        export(llama, tmp_path / "exported")
        assert "start it at random" in caplog.text

    def test_of_another_size_is_refused(self, llama, tmp_path):
        with pytest.raises(CheckpointError, match="as --vision-tower"):
            read_as_original(llama, PHI_TOWER)
        with pytest.raises(CheckpointError, match="missing: .*language_model.model.decoder"):
            read_as_original(llama, LLAMA.vision_tower)


class TestVocabulary:
    def test_trained_rows_are_kept(self, copy):
        """Even if they have no token in the original."""
        tensors = load_file(copy / "model.safetensors")
        tensors["model.language_model.embed_tokens.weight"][-1] = 1
        save_file(tensors, copy / "model.safetensors")
        checkpoint = read_as_original(copy)
        assert checkpoint.files["config.json"]["vocab_size"] == 512
        assert checkpoint.tensors["lm_head.weight"].shape[0] == 512

    def test_image_token_of_the_original_is_kept(self, tmp_path):
        source = Path(shutil.copytree(LLAMA.checkpoint, tmp_path / "source"))
        reserved = "<|reserved_special_token_2|>"
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (source / name).write_text((source / name).read_text().replace(reserved, "<image>"))
        convert(source, tmp_path / "converted", LLAMA.vision_tower)
        export(tmp_path / "converted", tmp_path / "exported")
        assert read(tmp_path / "exported" / "config.json")["vocab_size"] == 482
        convert(tmp_path / "exported", tmp_path / "again")
        ids = [AutoProcessor.from_pretrained(tmp_path / name).image_token_id for name in ("converted", "again")]
        assert ids == [470, 470]

    def test_tied_head_is_not_stored(self, tmp_path):
        source = Path(shutil.copytree(LLAMA.checkpoint, tmp_path / "source"))
        edit(source / "config.json", lambda config: config.update(tie_word_embeddings=True))
        convert(source, tmp_path / "converted", LLAMA.vision_tower)
        export(tmp_path / "converted", tmp_path / "exported")
        assert "lm_head.weight" not in all_tensors(tmp_path / "exported")
        assert read(tmp_path / "exported" / "config.json")["tie_word_embeddings"] is True
        convert(tmp_path / "exported", tmp_path / "again")
        assert_close(all_tensors(tmp_path / "again"), all_tensors(tmp_path / "converted"), rtol=0, atol=0)


class TestTextConfig:
    @pytest.mark.parametrize(
        ("model_type", "rope"),
        [
            ("llama", {"rope_type": "default", "rope_theta": 10000.0}),
            ("llama", {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}),
            ("phi3", {"rope_type": "default", "rope_theta": 10000.0}),
            ("mistral", {"rope_type": "default", "rope_theta": 1000000.0}),
            ("qwen2", {"rope_type": "default", "rope_theta": 1000000.0}),
        ],
    )
    def test_rope_fields_of_transformers_4_43(self, model_type, rope):
        config = tiny_text_config(model_type, rope_parameters=rope)
        original, unsupported = text_config_to_original(config)
        assert unsupported == []
        assert "rope_parameters" not in original and original["rope_theta"] == rope["rope_theta"]
        assert TEXT_MODEL_TYPES[original["model_type"]] == model_type
        assert text_config_from_original(original).to_dict() == config.to_dict()

    @pytest.mark.parametrize(
        ("model_type", "changes", "message"),
        [
            ("llama", {"head_dim": 64}, "head_dim 64"),
            (
                "qwen2",
                {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
                "'rope_type': 'linear'",
            ),
            (
                "phi3",
                {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 1e4}},
                "'partial_rotary_factor': 0.5",
            ),
            ("gemma", {}, "type 'gemma'"),
        ],
    )
    def test_unsupported_by_the_original(self, model_type, changes, message):
        _, unsupported = text_config_to_original(tiny_text_config(model_type, **changes))
        assert len(unsupported) == 1 and message in unsupported[0]


def tiny_text_config(model_type: str, **changes: Any) -> Any:
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
    return FlorenceVLConfig(text_config={"model_type": model_type, **sizes, **changes}, image_token_id=98).text_config


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"fusion_strategy": "average"}, "fusion_strategy 'average'"),
            ({"fusion_features": ["image", "ocr", "caption", "grounding"]}, "'ocr', 'caption', 'grounding'] \\(only"),
            ({"mask_prompt_padding": True}, "mask_prompt_padding"),
            ({"projector_hidden_act": "silu"}, "projector_hidden_act 'silu'"),
            (
                {
                    "prompts": {"caption": "Describe.", "ocr": "Read.", "grounding": "Locate."},
                    "prompt_token_ids": {"caption": [0, 5, 2], "ocr": [0, 6, 2], "grounding": [0, 7, 2]},
                },
                "the prompt 'caption', 'Describe.'; the prompt 'ocr'",
            ),
        ],
    )
    def test_unsupported_by_the_original(self, changes, message, copy, tmp_path):
        edit(copy / "config.json", lambda config: config.update(changes))
        self.refuse(copy, tmp_path, f"does not support .*{message}")

    def test_tower_with_another_mlp_ratio(self, copy, tmp_path):
        edit(copy / "config.json", lambda config: config["vision_config"]["vision_config"].update(mlp_ratio=2.0))
        self.refuse(copy, tmp_path, "a tower with mlp_ratio 2.0")

    def test_missing_and_unknown_tensors(self, copy, tmp_path):
        tensors = load_file(copy / "model.safetensors")
        del tensors["model.language_model.norm.weight"]
        save_file(tensors | {"model.extra": torch.zeros(1)}, copy / "model.safetensors")
        self.refuse(copy, tmp_path, "nothing uses: model.extra .* missing: model.language_model.norm.weight")

    def test_models_of_other_types(self, tmp_path):
        self.refuse(LLAMA.checkpoint, tmp_path, "model type 'llava_llama', expected 'florence_vl'")
        self.refuse(save_llm(tmp_path / "llm", "llama"), tmp_path, "model type 'llama'")

    def refuse(self, source: Path, tmp_path: Path, message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            export(source, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert [path for path in tmp_path.iterdir() if "incomplete" in path.name] == []


class TestCommand:
    def test_export(self, llama, tmp_path, capfd):
        assert status("export", llama, tmp_path / "out", "--max-shard-size", "1MB") == 0
        printed = capfd.readouterr()
        assert "llava_llama" in printed.out and "bfloat16" in printed.out and "Writing weights" in printed.err
        assert (tmp_path / "out" / "model.safetensors.index.json").is_file()

    def test_error_is_one_line(self, llama, tmp_path, capfd):
        assert status("export", llama, tmp_path / "out", "--vision-tower", PHI_TOWER) == 1
        error = capfd.readouterr().err.strip().split("\n")[-1]
        assert error.startswith("florence-vl: error: ") and "--vision-tower" in error
        assert not (tmp_path / "out").exists()
