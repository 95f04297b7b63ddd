# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Tiny models, and recorded outputs of the original to compare them with."""

import json
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from florence_vl_cli import main
from florence_vl_hf import FlorenceVLConfig, FlorenceVLForConditionalGeneration, FlorenceVLProcessor
from florence_vl_hf.conversion import convert


# Ignored in commands that a shell runs in the background, and then in all processes that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


FIXTURES = Path(__file__).parent / "fixtures"
IMAGE_PLACEHOLDER = -200

# Tests of `make test-vllm`, which has an environment of its own.
collect_ignore = ["vllm"]


@dataclass(frozen=True)
class Golden:
    """A tiny original checkpoint with random weights, and what the original code computed from it."""

    folder: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def vision_tower(self) -> Path | None:
        """The directory of the vision tower, if it is not in the checkpoint."""
        apart = self.folder / "vision_tower"
        return apart if apart.is_dir() else None

    @cached_property
    def reference(self) -> dict[str, Any]:
        return json.loads((self.folder / "reference.json").read_text(encoding="utf-8"))

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "reference.safetensors")

    def image_path(self, name: str) -> Path:
        return self.folder / "images" / name

    def image(self, name: str) -> Image.Image:
        return Image.open(self.image_path(name))

    def pixel_values(self, names: list[str]) -> torch.Tensor:
        return self.tensors["pixel_values"][[self.reference["images"].index(name) for name in names]]

    def forward_inputs(self, forward: dict[str, Any], config: FlorenceVLConfig) -> dict[str, torch.Tensor]:
        """Return a recorded batch with `num_image_tokens` of the model for each of the original's placeholders."""
        inputs, images = {}, []
        for name, padding in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
            rows = []
            for row, ids, values in zip(forward["rows"], forward["input_ids"], forward[name], strict=True):
                counts = [config.num_image_tokens if i == IMAGE_PLACEHOLDER else 1 for i in ids]
                rows.append(torch.tensor(values).repeat_interleave(torch.tensor(counts)))
                images += [row["image"]] * ids.count(IMAGE_PLACEHOLDER) * (name == "input_ids")
            inputs[name] = pad_sequence(rows, batch_first=True, padding_value=padding)
        inputs["input_ids"][inputs["input_ids"] == IMAGE_PLACEHOLDER] = config.image_token_id
        return {**inputs, "pixel_values": self.pixel_values(images)} if images else inputs

    def messages(self, dialog: int, image: str = "odd.jpg") -> list[dict[str, Any]]:
        """Return a recorded dialog as messages, with its image in place of the image token."""
        messages = []
        for turn in self.reference["dialogs"][dialog]["conversations"]:
            content = [{"type": "text", "text": turn["value"].replace("<image>", "")}]
            if "<image>" in turn["value"]:
                content.insert(0, {"type": "image", "image": self.image(image)})
            messages.append({"role": {"human": "user", "gpt": "assistant"}[turn["from"]], "content": content})
        return messages


def collapse(ids: list[int], values: list[int], image_token_id: int) -> list[int]:
    """Keep one of `values` for each run of image tokens in `ids`, as in the original."""
    return [v for i, v in enumerate(values) if i == 0 or not ids[i] == ids[i - 1] == image_token_id]


def status(*arguments: str | Path) -> int:
    """Run the command `florence-vl` and return its exit code."""
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    return exit_.value.code


@pytest.fixture
def browser() -> Iterator[Any]:
    """Headless Chromium, where playwright and a browser are installed."""
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        try:  # a system's browser, or that of playwright
            browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(str(error))
        yield browser
        browser.close()


@pytest.fixture(scope="session", params=["llama-small", "phi-small"])
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(FIXTURES / request.param)


@pytest.fixture(scope="session")
def converted(golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The converted checkpoint."""
    output = tmp_path_factory.mktemp("converted") / golden.folder.name
    convert(golden.checkpoint, output, vision_tower=golden.vision_tower)
    return output


@pytest.fixture(scope="session")
def processor(converted: Path) -> FlorenceVLProcessor:
    return AutoProcessor.from_pretrained(converted)


@pytest.fixture(scope="session", params=["eager", "sdpa"])
def model(request: pytest.FixtureRequest, converted: Path) -> FlorenceVLForConditionalGeneration:
    return AutoModelForImageTextToText.from_pretrained(
        converted, attn_implementation=request.param, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="session", autouse=True)
def _cache_of_datasets(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the cache of `datasets` out of the user's home."""
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")


def llava_sample(number: int, images: list[str], turns: int = 1) -> dict[str, Any]:
    """Return a sample in LLaVA's format, with images in its first turn."""
    conversations = []
    for i in range(turns):
        image_tokens = "<image>\n" * len(images) if i == 0 else ""
        conversations.append({"from": "human", "value": f"{image_tokens}What is {number + i}?"})
        conversations.append({"from": "gpt", "value": f"It is {number + i}."})
    sample: dict[str, Any] = {"id": f"sample-{number}", "conversations": conversations}
    if images:
        sample["image"] = images[0] if len(images) == 1 else images
    return sample


@pytest.fixture
def data_file(golden: Golden, tmp_path: Path) -> Path:
    """Eight samples with zero, one or two images and one or two turns."""
    images = [golden.image_path(name).name for name in golden.reference["images"]]
    samples = [
        llava_sample(number, images[number : number + (1, 1, 0, 2)[number % 4]], turns=1 + number % 2)
        for number in range(8)
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(samples), encoding="utf-8")
    return path


def tiny_config(**changes: Any) -> FlorenceVLConfig:
    """Return a tiny configuration: 5 tokens (2 x 2 positions and their mean) per 64 x 64 image."""
    settings: dict[str, Any] = {
        "vision_config": {
            "vision_config": {
                "embed_dim": [16, 16, 32, 32],
                "num_heads": [2, 2, 4, 4],
                "num_groups": [2, 2, 4, 4],
                "depths": [1, 1, 2, 1],
                "projection_dim": 16,
                "window_size": 4,
                "drop_path_rate": 0.0,
            },
            "text_config": {
                "model_type": "bart",
                "vocab_size": 40,
                "d_model": 16,
                "encoder_layers": 2,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 32,
                "decoder_layers": 1,
                "decoder_attention_heads": 2,
                "decoder_ffn_dim": 32,
                "max_position_embeddings": 32,
                "dropout": 0.0,
            },
        },
        "text_config": {
            "model_type": "llama",
            "vocab_size": 99,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        "image_size": 64,
        "image_token_id": 98,
        "prompts": {"caption": "Describe.", "ocr": "Read."},
        "prompt_token_ids": {"caption": [0, 7, 8, 2], "ocr": [0, 9, 2, 1]},
    }
    return FlorenceVLConfig(**{**settings, **changes})


def tiny_model(seed: int = 0, **changes: Any) -> FlorenceVLForConditionalGeneration:
    torch.manual_seed(seed)
    return FlorenceVLForConditionalGeneration(tiny_config(**changes)).eval()


def tiny_inputs(
    config: FlorenceVLConfig, images_per_sample: list[int], text_length: int = 6
) -> dict[str, torch.Tensor]:
    """Return left-padded samples with any number of images each, before the text."""
    generator = torch.Generator().manual_seed(1)
    samples = []
    for num_images in images_per_sample:
        text = torch.randint(3, 90, (text_length,), generator=generator)
        samples.append(torch.cat([torch.full((num_images * config.num_image_tokens,), config.image_token_id), text]))
    length = max(len(sample) for sample in samples)
    pad = config.text_config.pad_token_id
    input_ids = torch.stack([torch.cat([torch.full((length - len(sample),), pad), sample]) for sample in samples])
    inputs = {"input_ids": input_ids, "attention_mask": (input_ids != pad).long()}
    if sum(images_per_sample):
        shape = (sum(images_per_sample), 3, config.image_size, config.image_size)
        inputs["pixel_values"] = torch.randn(shape, generator=generator)
    return inputs


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Keep the input of each layer for the backward pass, and recompute everything else."""
    # Renamed in Transformers 5.23.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
