# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

from florence_vl_hf import FlorenceVLForConditionalGeneration, FlorenceVLModel, FlorenceVLProcessor
from florence_vl_hf.conversion.remote_code import write_remote_code

from ..conftest import tiny_model


@dataclass(frozen=True)
class Without:
    """What the folder gave in a process that cannot import the package."""

    folder: Path

    @property
    def facts(self) -> dict[str, Any]:
        return json.loads((self.folder / "facts.json").read_text())

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "tensors.safetensors")


@pytest.fixture(scope="session")
def without(converted, golden, tmp_path_factory) -> Without:
    folder = tmp_path_factory.mktemp("without")
    script = Path(__file__).with_name("without_package.py")
    command = [sys.executable, script, converted, golden.image_path("odd.jpg"), folder]
    environment = {**os.environ, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_MODULES_CACHE", None)
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    return Without(folder)


@pytest.fixture(scope="session")
def messages(golden) -> list[dict[str, Any]]:
    content = [
        {"type": "image", "path": str(golden.image_path("odd.jpg"))},
        {"type": "text", "text": "What is shown?"},
    ]
    return [{"role": "user", "content": content}]


@pytest.fixture(scope="session")
def inputs(processor, messages) -> dict[str, torch.Tensor]:
    return processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )


class TestWithoutThePackage:
    def test_every_auto_class_takes_the_code_of_the_folder(self, without):
        classes = without.facts["classes"]
        assert {name: full_name.rsplit(".", 1)[1] for name, full_name in classes.items()} == {
            "AutoConfig": "FlorenceVLConfig",
            "AutoModel": "FlorenceVLModel",
            "AutoModelForImageTextToText": "FlorenceVLForConditionalGeneration",
            "AutoModelForMultimodalLM": "FlorenceVLForConditionalGeneration",
            "AutoProcessor": "FlorenceVLProcessor",
        }
        assert all(full_name.startswith("transformers_modules.") for full_name in classes.values())

    @torch.no_grad()
    def test_computes_what_the_package_computes(self, without, converted, inputs):
        model = AutoModelForImageTextToText.from_pretrained(converted).eval()
        assert_close(without.tensors["logits"], model(**inputs).logits, rtol=0, atol=0)
        assert_close(without.tensors["generated"], model.generate(**inputs, max_new_tokens=5), rtol=0, atol=0)
        base = AutoModel.from_pretrained(converted).eval()
        assert_close(without.tensors["hidden"], base(**inputs).last_hidden_state, rtol=0, atol=0)

    def test_pipeline(self, without, converted, messages):
        pipe = pipeline("image-text-to-text", model=str(converted), dtype=torch.float32)
        expected = pipe(text=messages, max_new_tokens=5)[0]["generated_text"][-1]["content"]
        assert expected and without.facts["pipeline"] == expected

    def test_is_refused_unless_trusted(self, without):
        refusals = without.facts["refusals"]
        assert len(refusals) == 5 and all("contains custom code" in refusal for refusal in refusals)

    def test_format_by_name_says_that_it_needs_the_package(self, without):
        assert "no chat template 'plain' here" in without.facts["no_such_format"]
        assert "Install it" in without.facts["no_such_format"]

    def test_saved_again_it_still_loads(self, without, converted, inputs):
        assert_close(without.tensors["logits_again"], without.tensors["logits"], rtol=0, atol=0)
        # And with the package.
        again = AutoModelForImageTextToText.from_pretrained(without.folder / "saved-again").eval()
        assert type(again) is FlorenceVLForConditionalGeneration
        with torch.no_grad():
            assert_close(again(**inputs).logits, without.tensors["logits"], rtol=0, atol=0)

    def test_what_the_card_shows_runs(self, without):
        assert without.facts["card"].strip()


class TestWithThePackage:
    @pytest.mark.parametrize("trust_remote_code", [None, False, True])
    def test_its_classes_are_used_without_asking(self, trust_remote_code, converted):
        trust = {"trust_remote_code": trust_remote_code}
        assert type(AutoProcessor.from_pretrained(converted, **trust)) is FlorenceVLProcessor
        assert type(AutoModel.from_pretrained(converted, **trust)) is FlorenceVLModel
        head = AutoModelForImageTextToText.from_pretrained(converted, **trust)
        assert type(head) is FlorenceVLForConditionalGeneration

    def test_model_that_was_never_converted(self, processor, tmp_path):
        model = tiny_model()
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        before = json.loads((tmp_path / "config.json").read_text())
        write_remote_code(tmp_path)
        after = json.loads((tmp_path / "config.json").read_text())
        assert set(after.pop("auto_map")) > {"AutoConfig", "AutoModel", "AutoProcessor"}
        assert after == before
        modules = {path.stem for path in tmp_path.glob("*.py")}
        assert {"configuration_florence_vl", "modeling_florence_vl", "processing_florence_vl"} <= modules
        assert_close(AutoModel.from_pretrained(tmp_path).state_dict(), model.model.state_dict(), rtol=0, atol=0)
