# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Encoders, and the cache of their features."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import (
    AutoImageProcessor,
    AutoModel,
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    ConvNextImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    GPT2Config,
    GPT2Model,
    ResNetConfig,
    ResNetModel,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

from florence_vl_hf.analysis.encoders import (
    Encoder,
    digest_of,
    encode_items,
    florence_encoder,
    image_encoder,
    language_encoder,
)
from florence_vl_hf.conversion import CheckpointError, load_pretrained, load_processor

from ..conftest import status
from ..conversion.test_assemble_florence_vl import native
from ..evaluation.conftest import directory


__all__ = ["directory", "native"]


def write_pairs(folder: Path, number: int) -> list[dict[str, str]]:
    """Write images of different colours, and `pairs.json`."""
    folder.mkdir(exist_ok=True)
    for i in range(number):
        Image.effect_noise((40, 30), 50 + i).convert("RGB").rotate(90 * (i % 4)).save(folder / f"{i}.png")
    pairs = [{"image": f"{i}.png", "caption": f"Image {i}" + i % 5 * " of noise"} for i in range(number)]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    return [{**pair, "image": str(folder / pair["image"])} for pair in pairs]


@pytest.fixture(scope="session")
def encoders(tmp_path_factory) -> dict[str, Path]:
    """Tiny random encoders by model type, in directories."""
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**size, "image_size": 32, "patch_size": 8}
    text = {**size, "vocab_size": 50, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}
    square, side = {"height": 32, "width": 32}, {"shortest_edge": 32}
    torch.manual_seed(0)
    models = {
        "clip": (
            CLIPModel(CLIPConfig(text_config=text, vision_config=vision)),
            CLIPImageProcessorPil(size=side, crop_size=square),
        ),
        "siglip": (
            SiglipModel(SiglipConfig(text_config=text, vision_config=vision)),
            SiglipImageProcessorPil(size=square),
        ),
        "dinov2": (
            Dinov2Model(Dinov2Config(**{k: v for k, v in vision.items() if k != "intermediate_size"})),
            BitImageProcessorPil(size=side, crop_size=square),
        ),
        "resnet": (
            ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1])),
            ConvNextImageProcessorPil(size=side, crop_pct=1.0),
        ),
    }
    directories = {}
    for name, (model, image_processor) in models.items():
        directories[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(directories[name])
        image_processor.save_pretrained(directories[name])
    return directories


class TestEncodeItems:
    """With an encoder that records its batches."""

    @pytest.fixture
    def batches(self) -> list[list[str]]:
        return []

    @pytest.fixture
    def encoder(self, batches) -> Encoder:
        def encode(inputs: list[str]) -> dict[str, torch.Tensor]:
            batches.append(inputs)
            # A feature that depends on the other inputs of the batch.
            return {"length": torch.tensor([[float(len(text)), len(inputs)] for text in inputs])}

        return Encoder("counts", "key", lambda: encode)

    def test_resumed_batches_are_those_of_one_run(self, encoder, batches, tmp_path):
        items = {digest_of(text): text for text in ("a", "bb", "ccc", "dddd", "eeeee")}
        whole = encode_items(encoder, items, tmp_path / "whole", 2)
        assert batches == [["a", "bb"], ["ccc", "dddd"], ["eeeee"]]
        for lost in ("bb", "dddd"):
            (tmp_path / "whole" / "key" / f"{digest_of(lost)}.safetensors").unlink()
        (tmp_path / "whole" / "key" / f"{digest_of('dddd')}.safetensors").write_bytes(b"damaged")
        batches.clear()
        assert_close(encode_items(encoder, items, tmp_path / "whole", 2), whole, rtol=0, atol=0)
        assert batches == [["a", "bb"], ["ccc", "dddd"]]
        batches.clear()
        encode_items(encoder, items, tmp_path / "whole", 2)
        assert batches == []

    def test_unreadable_items_are_reported_and_not_encoded_for(self, encoder, batches, tmp_path):
        def read(text: str) -> str:
            if text == "bad":
                raise ValueError("bad is bad")
            return text

        items, errors = {text: text for text in ("a", "bad", "ccc")}, {}
        for _ in range(2):
            features = encode_items(encoder, items, tmp_path, 2, read, errors)
            assert list(features) == ["a", "ccc"] and errors == {"bad": "bad is bad"}
        assert batches == [["a"], ["ccc"]]

    def test_features_that_are_not_finite(self, tmp_path):
        encoder = Encoder("tiny", "key", lambda: lambda inputs: {"x": torch.tensor([[1.0, float("inf")]])})
        with pytest.raises(ValueError, match="Features of tiny are not finite; use --dtype float32"):
            encode_items(encoder, {"a": "a"}, tmp_path, 2)
        assert list((tmp_path / "key").iterdir()) == []


class TestEncoders:
    @pytest.mark.parametrize("name", ["clip", "siglip", "dinov2", "resnet"])
    def test_mean_over_tokens(self, name, encoders):
        image = Image.effect_noise((32, 32), 80).convert("RGB")
        encode = image_encoder(encoders[name], None, "cpu").load()
        model = AutoModel.from_pretrained(encoders[name]).eval()
        pixels = AutoImageProcessor.from_pretrained(encoders[name])(image, return_tensors="pt").pixel_values
        with torch.no_grad():
            if name in ("clip", "siglip"):
                tokens = [*model.vision_model(pixels).last_hidden_state[0]]
            else:
                tokens = [*model(pixels).last_hidden_state[0]]
                tokens = tokens if name == "dinov2" else [*torch.stack(tokens).flatten(1).T]
        assert len(tokens) == {"clip": 17, "siglip": 16, "dinov2": 17, "resnet": 16}[name]
        assert_close(encode([image, image])["tokens"][1], sum(tokens) / len(tokens))

    def test_another_language_model(self, directory, tmp_path):
        """Gives the same as that of the Florence-VL it is taken from, alone and in a padded batch."""
        model, processor = load_pretrained(directory, dtype=torch.float32)
        model.model.language_model.save_pretrained(tmp_path)
        processor.tokenizer.save_pretrained(tmp_path)
        captions = ["A cat.", "A cat on a mat \ud800 in a large house", "no"]
        own = language_encoder(directory, None, "cpu").load()(captions)["tokens"]
        given = language_encoder(tmp_path, None, "cpu").load()
        assert_close(given(captions)["tokens"], own)
        assert_close(torch.cat([given([caption])["tokens"] for caption in captions]), own)

    def test_padding_changes_no_positions(self, directory, tmp_path):
        """With learned positions, and a tokenizer without a padding token."""
        tokenizer = load_processor(directory).tokenizer
        tokenizer.pad_token = None
        tokenizer.save_pretrained(tmp_path)
        config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=8)
        GPT2Model(config).save_pretrained(tmp_path)
        encode = language_encoder(tmp_path, None, "cpu").load()
        captions = ["A cat.", "no", "longer than eight tokens, of which the last ones are dropped"]
        assert_close(encode(captions)["tokens"], torch.cat([encode([text])["tokens"] for text in captions]))

    def test_florence_2_has_no_language_model(self, native):
        with pytest.raises(CheckpointError, match="has no language model; give the one that reads the captions"):
            language_encoder(native, None, "cpu")
        image = Image.new("RGB", (20, 20))
        features = florence_encoder(native, torch.float32, "cpu").load()([image, image])
        assert set(features) == {"image", "caption", "ocr", "grounding"} and len(features["ocr"]) == 2

    def test_key_changes_with_the_model(self, encoders, tmp_path):
        model = shutil.copytree(encoders["clip"], tmp_path / "clip")
        keys = {image_encoder(model, dtype, "cpu").key for dtype in (None, torch.float16)}
        assert image_encoder(model, None, "cpu").key in keys
        weights = (model / "model.safetensors").stat()
        os.utime(model / "model.safetensors", ns=(weights.st_atime_ns, weights.st_mtime_ns + 1))
        keys.add(image_encoder(model, None, "cpu").key)
        os.utime(model / "config.json", ns=(0, 0))  # the same content
        assert image_encoder(model, None, "cpu").key in keys
        settings = json.loads((model / "preprocessor_config.json").read_text())
        (model / "preprocessor_config.json").write_text(json.dumps({**settings, "do_normalize": False}))
        keys.add(image_encoder(model, None, "cpu").key)
        assert len(keys) == 4 and all(key.startswith("clip-vision-") for key in keys)

    def test_not_an_image_encoder(self, directory, tmp_path):
        model, processor = load_pretrained(directory, dtype=torch.float32)
        model.model.language_model.save_pretrained(tmp_path / "llama")
        with pytest.raises(ValueError, match="llama cannot be loaded as an image encoder"):
            image_encoder(tmp_path / "llama", None, "cpu")
        with pytest.raises(CheckpointError, match="nowhere is neither a directory"):
            image_encoder("nowhere", None, "cpu")
        with pytest.raises(ValueError, match="is a florence_vl, expected an encoder of images alone"):
            image_encoder(directory, None, "cpu").load()


# Stops before the 21st file is complete.
KILLED = """
import os, sys, time
from florence_vl_cli import main
replace, num_files = os.replace, 0
def stop(source, target):
    global num_files
    num_files += str(target).endswith(".safetensors")
    time.sleep(600 * (num_files > 20))
    replace(source, target)
os.replace = stop
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_run_goes_on(directory, tmp_path):
    write_pairs(tmp_path, 30)
    command = ["align", tmp_path / "pairs.json", "--model", directory, "--device", "cpu", "--output"]
    arguments = [str(argument) for argument in (*command, tmp_path / "killed")]
    process = subprocess.Popen([sys.executable, "-c", KILLED, *arguments])
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("killed.cache/*/*.safetensors"))) < 20 or not [
        *tmp_path.glob("killed.cache/*/.*.incomplete")
    ]:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    files = sorted(tmp_path.glob("killed.cache/*/*.safetensors"), key=os.path.getmtime)
    before = {file: file.stat().st_mtime_ns for file in files}
    assert len(files) == 20 and not (tmp_path / "killed").exists()
    assert status(*command, tmp_path / "killed") == status(*command, tmp_path / "whole") == 0
    # Of the third batch of eight images, four were there.
    assert [file for file in files if file.stat().st_mtime_ns == before[file]] == files[:16]
    assert not list(tmp_path.glob("killed.cache/*/.*"))
    for name in ("alignment.json", "alignment.md", "curves.png"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
