# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""The script that records the original, run on a stand-in with the original's modules and ways of being called."""

import ast
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText

from florence_vl_hf import FlorenceVLForConditionalGeneration
from florence_vl_hf.conversion.reference import IMAGE_TOKEN_INDEX, RECORD_SCRIPT, expand_image_tokens
from florence_vl_hf.conversion.verification import Tolerances, Verdict, agrees, verify

from ..conftest import Golden


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("record_reference", RECORD_SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class DaViT(nn.Module):
    """As Florence-2's first release: never called itself, but block group by block group."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([BlockGroup(), BlockGroup()])


class BlockGroup(nn.Module):
    def forward(self, positions: torch.Tensor, size: tuple[int, int]) -> tuple[torch.Tensor, tuple[int, int]]:
        return positions, size


class Tower(nn.Module):
    """Encodes an image once per prompt, as the original may; gives V, and V't of all prompts along channels."""

    def __init__(self, ours: FlorenceVLForConditionalGeneration, image_processor: object) -> None:
        super().__init__()
        self.ours = [ours]
        self.image_processor = image_processor
        self.vision_tower = nn.Module()
        self.vision_tower.vision_tower = DaViT()

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = self.ours[0].get_image_features(images, output_hidden_states=True)
        positions, grid = output.hidden_states[-1].flatten(2).transpose(1, 2).repeat(3, 1, 1), (0, 0)
        first, last = self.vision_tower.vision_tower.blocks
        first(torch.zeros_like(positions), grid)
        last(positions, grid)
        image_feature, *prompt_features = output.features.values()
        return image_feature, torch.cat(prompt_features, dim=-1)


class Projector(nn.Module):
    def __init__(self, ours: FlorenceVLForConditionalGeneration) -> None:
        super().__init__()
        self.ours = [ours]

    def forward(self, image_feature: torch.Tensor, prompt_features: torch.Tensor) -> torch.Tensor:
        return self.ours[0].model.multi_modal_projector(torch.cat([image_feature, prompt_features], dim=-1))


class Original(nn.Module):
    """What the script uses of `LlavaLlamaForCausalLM`, computed by ours."""

    def __init__(self, ours: FlorenceVLForConditionalGeneration, image_processor: object, model_type: str) -> None:
        super().__init__()
        self.ours = [ours]
        self.config = SimpleNamespace(model_type=model_type, image_aspect_ratio="pad")
        self.device, self.dtype = ours.device, ours.dtype
        self.mm_projector = Projector(ours)
        self.vision_tower = Tower(ours, image_processor)

    def get_model(self) -> nn.Module:
        return self

    def get_vision_tower(self) -> nn.Module:
        return self.vision_tower

    def _inputs(self, input_ids: torch.Tensor, images: torch.Tensor) -> dict[str, torch.Tensor]:
        self.mm_projector(*self.vision_tower(images))
        token_ids = expand_image_tokens(input_ids[0].tolist(), self.ours[0].config)
        return {"input_ids": torch.tensor([token_ids]), "pixel_values": images}

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, images: torch.Tensor) -> SimpleNamespace:
        assert attention_mask.shape == input_ids.shape
        return SimpleNamespace(logits=self.ours[0](**self._inputs(input_ids, images)).logits)

    def generate(self, input_ids: torch.Tensor, images: torch.Tensor, **settings: object) -> torch.Tensor:
        inputs = self._inputs(input_ids, images)
        return self.ours[0].generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]


@pytest.fixture
def ours(converted: Path) -> FlorenceVLForConditionalGeneration:
    return AutoModelForImageTextToText.from_pretrained(converted, dtype=torch.float32)


@pytest.fixture
def llava(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict]:
    """A stand-in for the package `llava`, whose prompt is always that of the recorded dialog 0."""
    dialog = golden.reference["dialogs"][0]

    class Conversation:
        roles = ("user", "assistant")

        def __init__(self) -> None:
            self.messages: list[tuple[str, str | None]] = []

        def copy(self) -> "Conversation":
            return Conversation()

        def append_message(self, role: str, message: str | None) -> None:
            self.messages.append((role, message))

        def get_prompt(self) -> str:
            assert self.messages == [("user", dialog["conversations"][0]["value"]), ("assistant", None)]
            return dialog["chat_prompt"]

    def tokenizer_image_token(prompt: str, tokenizer: object, image_token_index: int) -> list[int]:
        assert (prompt, image_token_index) == (dialog["chat_prompt"], IMAGE_TOKEN_INDEX)
        return dialog["chat_input_ids"]

    def process_images(images: list, image_processor: object, config: object) -> torch.Tensor:
        return image_processor(images, return_tensors="pt").pixel_values

    contents = {
        "llava": {},
        "llava.conversation": {"conv_templates": {"llama3": Conversation(), "phi3": Conversation()}},
        "llava.mm_utils": {"tokenizer_image_token": tokenizer_image_token, "process_images": process_images},
    }
    for name, names in contents.items():
        module = ModuleType(name)
        module.__dict__.update(names)
        monkeypatch.setitem(sys.modules, name, module)
    yield dialog


def test_verify_reads_what_is_recorded(script, golden, ours, processor, llava, tmp_path, monkeypatch, capsys):
    model_type = f"llava_{golden.reference['family']}"
    original = Original(ours, processor.image_processor, model_type)
    monkeypatch.setattr(script, "load_original", lambda *arguments: (None, original))
    output = tmp_path / "recorded" / "reference.safetensors"
    question = llava["conversations"][0]["value"].removeprefix("<image>\n")
    arguments = ["--checkpoint", "x", "--images", str(golden.folder / "images"), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["record_reference.py", *arguments, "--question", question, "--device", "cpu"])
    script.main()
    assert f"One image takes {ours.config.num_image_tokens} image tokens" in capsys.readouterr().out

    results = verify(ours, processor, output)
    assert agrees(results)
    assert {result.verdict for result in results} == {Verdict.OK}

    # Names, shapes and values are those of the recordings that were made without this script.
    tensors, record = load_file(output), json.loads(output.with_suffix(".json").read_text())
    for name, expected in golden.tensors.items():
        if not name.startswith("forward"):
            tolerance = Tolerances.davit * expected.abs().max().item() if name == "davit" else Tolerances.features
            assert_close(tensors[name], expected, rtol=0, atol=tolerance)
    assert tensors["forward0.logits"].shape[0] == 1
    assert tensors["forward0.logits"].shape[2] == -(-ours.config.text_config.vocab_size // 5)
    for key in ("images", "image_size", "image_aspect_ratio", "image_token_placeholder"):
        assert record[key] == golden.reference[key]
    for entry in ("dialogs", "forwards", "generations"):
        assert set(record[entry][0]) <= set(golden.reference[entry][0])
    assert record["generations"][0] == golden.reference["generations"][0]


def test_images_already_in_place_are_kept(script, golden, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"image")
    script.write(tmp_path / "r.safetensors", {"projected": torch.zeros(1)}, {"images": ["a.png"]}, tmp_path / "images")
    assert (tmp_path / "images" / "a.png").read_bytes() == b"image"
    assert (tmp_path / "r.json").exists() and (tmp_path / "r.safetensors").exists()


@pytest.mark.parametrize(("image_aspect_ratio", "expected"), [("pad", 1.0), ("square", 2.0), (None, 2.0)])
def test_images_are_preprocessed_as_in_training(image_aspect_ratio, expected, script, monkeypatch):
    """Florence-2's processor takes text first, so that `process_images` only works for padded images."""

    def image_processor(text: list[str], images: object, **kwargs: object) -> dict[str, torch.Tensor]:
        assert all(isinstance(part, str) for part in text)
        return {"pixel_values": torch.full((1, 3, 8, 8), 2.0)}

    module = ModuleType("llava.mm_utils")
    module.process_images = lambda images, image_processor, config: torch.full((1, 3, 8, 8), 1.0)
    monkeypatch.setitem(sys.modules, "llava", ModuleType("llava"))
    monkeypatch.setitem(sys.modules, "llava.mm_utils", module)
    config = SimpleNamespace(image_aspect_ratio=image_aspect_ratio)
    pixel_values = script.preprocess(object(), image_processor, config)
    assert_close(pixel_values, torch.full((3, 8, 8), expected))


def test_runs_without_this_package_on_python_3_10():
    tree = ast.parse(RECORD_SCRIPT.read_text(encoding="utf-8"), feature_version=(3, 10))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module or "" for node in imports if isinstance(node, ast.ImportFrom)}
    assert all(not isinstance(node, ast.ImportFrom) or node.level == 0 for node in imports)
    packages = {module.split(".")[0] for module in modules} - sys.stdlib_module_names
    assert packages == {"PIL", "llava", "safetensors", "torch", "transformers"}
