# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Directories that `save_pretrained` wrote load where this package is not installed, whoever called it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    pipeline,
)
from trl import SFTConfig, SFTTrainer

from florence_vl_hf import FlorenceVLForConditionalGeneration, FlorenceVLModel, FlorenceVLProcessor
from florence_vl_hf.conversion import load_original
from florence_vl_hf.training import FlorenceVLCollator, load_conversations, lora_config

from .conftest import Golden


def save_by_hand(model: PreTrainedModel, processor: FlorenceVLProcessor, output: Path) -> None:
    model.save_pretrained(output)
    processor.save_pretrained(output)


def train_with_trainer(model: PreTrainedModel, processor: FlorenceVLProcessor, output: Path, data_file: Path) -> None:
    args = TrainingArguments(output, max_steps=1, use_cpu=True, remove_unused_columns=False, report_to="none")
    trainer = Trainer(
        model,
        args,
        FlorenceVLCollator(processor),
        train_dataset=load_conversations(data_file, image_folder=data_file.parent),
        processing_class=processor,
    )
    trainer.train()
    trainer.save_model()


def train_with_trl(model: PreTrainedModel, processor: FlorenceVLProcessor, output: Path, data_file: Path) -> None:
    messages = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]
    args = SFTConfig(output, max_steps=1, max_length=None, use_cpu=True, bf16=False, report_to="none")
    dataset = datasets.Dataset.from_list([{"messages": messages}] * 2)
    trainer = SFTTrainer(model, args, train_dataset=dataset, processing_class=processor.tokenizer)
    trainer.train()
    trainer.save_model()
    processor.save_pretrained(output)


def merge_with_peft(model: PreTrainedModel, processor: FlorenceVLProcessor, output: Path, data_file: Path) -> None:
    get_peft_model(model, lora_config(model, rank=2)).merge_and_unload().save_pretrained(output)
    processor.save_pretrained(output)


def build_in_python(model: PreTrainedModel, processor: FlorenceVLProcessor, output: Path, data_file: Path) -> None:
    built = FlorenceVLForConditionalGeneration(type(model.config)(**model.config.to_dict()))
    save_by_hand(built, FlorenceVLProcessor(**vars_of(processor)), output)


def vars_of(processor: FlorenceVLProcessor) -> dict[str, Any]:
    names = ("image_processor", "tokenizer", "num_image_tokens", "chat_template")
    return {name: getattr(processor, name) for name in names}


WAYS: dict[str, Callable[[PreTrainedModel, FlorenceVLProcessor, Path, Path], None]] = {
    "by hand": lambda model, processor, output, data_file: save_by_hand(model, processor, output),
    "Trainer": train_with_trainer,
    "TRL": train_with_trl,
    "merged by peft": merge_with_peft,
    "built in Python": build_in_python,
}


@pytest.fixture(scope="module")
def saved(golden: Golden, converted: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories by the way in which they were saved."""
    root = tmp_path_factory.mktemp("saved")
    image = golden.image_path("odd.jpg")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "It."}]
    (root / "data.json").write_text(json.dumps([{"id": "0", "image": image.name, "conversations": turns}] * 2))
    (root / image.name).write_bytes(image.read_bytes())
    directories = {"converted": converted, "original": root / "original"}
    save_by_hand(*load_original(golden.checkpoint, vision_tower=golden.vision_tower), directories["original"])
    for way, save in WAYS.items():
        directories[way] = root / way
        model = AutoModelForImageTextToText.from_pretrained(converted)
        save(model, AutoProcessor.from_pretrained(converted), directories[way], root / "data.json")
    return directories


@pytest.fixture(scope="module")
def without(saved: dict[str, Path], golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the directories give in an interpreter that cannot import the package."""
    output = tmp_path_factory.mktemp("without")
    script = Path(__file__).with_name("without_package.py")
    image, directories = golden.image_path("odd.jpg"), {name: str(path) for name, path in saved.items()}
    command = [sys.executable, script, output, image, saved["converted"], json.dumps(directories)]
    environment = {**os.environ, "HF_HOME": str(output / "hf"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_MODULES_CACHE", None)
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    facts = json.loads((output / "facts.json").read_text())
    tensors = {name: load_file(output / f"{number}.safetensors") for number, name in enumerate(facts["classes"])}
    return {**facts, "tensors": tensors, "saved again": output / "saved-again"}


@pytest.fixture(scope="module")
def messages(golden: Golden) -> list[dict[str, Any]]:
    image = {"type": "image", "path": str(golden.image_path("odd.jpg"))}
    return [{"role": "user", "content": [image, {"type": "text", "text": "What is shown?"}]}]


@pytest.fixture(scope="module")
def inputs(processor: FlorenceVLProcessor, messages: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )


@pytest.mark.slow
class TestWithoutThePackage:
    @pytest.mark.parametrize("way", ["converted", "original", *WAYS, "saved again without the package"])
    def test_every_auto_class_uses_the_code_of_the_directory(self, way, without):
        classes = without["classes"][way]
        assert {name: full_name.rsplit(".", 1)[1] for name, full_name in classes.items()} == {
            "AutoConfig": "FlorenceVLConfig",
            "AutoModel": "FlorenceVLModel",
            "AutoModelForImageTextToText": "FlorenceVLForConditionalGeneration",
            "AutoModelForMultimodalLM": "FlorenceVLForConditionalGeneration",
            "AutoProcessor": "FlorenceVLProcessor",
        }
        assert all(full_name.startswith("transformers_modules.") for full_name in classes.values())

    @pytest.mark.parametrize("way", ["converted", "original", *WAYS])
    @torch.no_grad()
    def test_computes_what_the_package_computes(self, way, without, saved, inputs):
        tensors = without["tensors"][way]
        model = AutoModelForImageTextToText.from_pretrained(saved[way]).eval()
        assert type(model) is FlorenceVLForConditionalGeneration
        assert_close(tensors["logits"], model(**inputs).logits, rtol=0, atol=0)
        assert_close(tensors["generated"], model.generate(**inputs, max_new_tokens=5), rtol=0, atol=0)
        base = AutoModel.from_pretrained(saved[way]).eval()
        assert_close(tensors["hidden"], base(**inputs).last_hidden_state, rtol=0, atol=0)

    def test_saved_again_without_the_package(self, without):
        tensors = without["tensors"]
        assert_close(tensors["saved again without the package"], tensors["converted"], rtol=0, atol=0)
        again = AutoModelForImageTextToText.from_pretrained(without["saved again"])
        assert type(again) is FlorenceVLForConditionalGeneration

    def test_pipeline(self, without, converted, messages):
        pipe = pipeline("image-text-to-text", model=str(converted), dtype=torch.float32)
        expected = pipe(text=messages, max_new_tokens=5)[0]["generated_text"][-1]["content"]
        assert expected and without["pipeline"] == expected

    def test_refuses_without_trust(self, without):
        assert len(without["refusals"]) == 5
        assert all("contains custom code" in refusal for refusal in without["refusals"])

    def test_chat_template_by_name_requires_the_package(self, without):
        assert "no chat template 'plain' here" in without["no_template"]
        assert "Install it" in without["no_template"]

    def test_example_of_the_card_runs(self, without):
        assert without["card"].strip()


@pytest.mark.parametrize("trust_remote_code", [None, False, True])
def test_the_installed_package_takes_precedence(trust_remote_code, converted):
    trust = {"trust_remote_code": trust_remote_code}
    assert type(AutoProcessor.from_pretrained(converted, **trust)) is FlorenceVLProcessor
    assert type(AutoModel.from_pretrained(converted, **trust)) is FlorenceVLModel
    head = AutoModelForImageTextToText.from_pretrained(converted, **trust)
    assert type(head) is FlorenceVLForConditionalGeneration
