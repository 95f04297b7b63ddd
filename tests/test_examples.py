# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""The scripts in `examples/`, run as a user runs them. training/test_trl_trainers.py runs those of `examples/trl/`."""

import csv
import io
import json
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from florence_vl_hf import FlorenceVLForConditionalGeneration, FlorenceVLProcessor
from florence_vl_hf.conversion import convert, load_pretrained
from florence_vl_hf.serving import ChatSession
from florence_vl_hf.training import SampleError

from .conftest import FIXTURES, Golden


EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden(FIXTURES / "llama-small")


@pytest.fixture(scope="module")
def directory(golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model in float32."""
    output = tmp_path_factory.mktemp("examples") / "model"
    convert(golden.checkpoint, output, vision_tower=golden.vision_tower, dtype=torch.float32)
    return output


@pytest.fixture(scope="module")
def loaded(directory: Path) -> tuple[FlorenceVLForConditionalGeneration, FlorenceVLProcessor]:
    model, processor = load_pretrained(directory, device_map="cpu")
    return model.eval(), processor


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a script with arguments, and return what it prints."""

    def run(name: str, *arguments: Any, stdin: str = "", status: int | str = 0) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        captured = capsys.readouterr()
        assert exit_.value.code == status, captured.err
        return captured.err if status else captured.out

    return run


def answer(loaded: Any, image: Image.Image, question: str, max_new_tokens: int) -> str:
    """Answer one question about one image greedily."""
    model, processor = loaded
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
        add_generation_prompt=True,
    )
    inputs = processor(images=image.convert("RGB"), text=prompt, add_special_tokens=False, return_tensors="pt")
    output_ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.decode(output_ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_every_script_is_run():
    tested = set(re.findall(r'run\("(\w+\.py)"', Path(__file__).read_text(encoding="utf-8")))
    documented = set(re.findall(r"python examples/(\w+\.py)", (EXAMPLES / "README.md").read_text(encoding="utf-8")))
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested == documented


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_missing_file(name, run):
    model = [] if name == "server_client.py" else ["nowhere"]
    assert re.search("nowhere.png'? does not exist", run(name, *model, "nowhere.png", status=2))


def test_chat(run, directory, golden, loaded):
    image, questions = golden.image_path("odd.jpg"), ["What is it?", "And what else?"]
    printed = run("chat.py", directory, image, "--max-new-tokens", 8, stdin="\n".join([*questions, "", ""]))
    # The session encodes the image once, and has no text streamed.
    session = ChatSession(*loaded, [str(image)])
    session.model.generation_config.max_new_tokens = 8
    answers = [session.answer(question) for question in questions]
    assert len(set(answers)) == 2
    prompt = "Question, or nothing to leave: "
    assert [text.strip() for text in printed.split(prompt)] == ["", *answers, ""]


def test_batch_captioning(run, directory, golden, loaded, tmp_path):
    images, output = shutil.copytree(golden.folder / "images", tmp_path / "images"), tmp_path / "captions.jsonl"
    names = sorted(path.name for path in images.iterdir())
    (images / "b.png").write_bytes(b"no image")
    (images / "notes.txt").touch()
    options = ["--output", output, "--question", "What?", "--batch-size", 3, "--max-new-tokens", 6]
    printed = run("batch_captioning.py", directory, images, *options)
    assert f"Skipping: {images / 'b.png'} cannot be read as an image (no known image format)" in printed
    captions = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert captions == [{"image": name, "caption": answer(loaded, golden.image(name), "What?", 6)} for name in names]
    assert len({line["caption"] for line in captions}) > 3
    with pytest.raises(FileExistsError, match="captions.jsonl"):
        run("batch_captioning.py", directory, images, "--output", output)


def draw_page(width: int, lines: range) -> Image.Image:
    """Draw lines of text, 10 pixels high, at the given rows. Below the last one is a blank margin."""
    page = Image.new("RGB", (width, lines.stop), "white")
    canvas = ImageDraw.Draw(page)
    for row in lines:
        for column in range(10, width - 20, 14):
            canvas.rectangle((column, row, column + 3 + row % 7, row + 9), fill="black")
    return page


def test_document_ocr(run, directory, loaded, tmp_path):
    tall, wide = draw_page(150, range(8, 490, 22)), draw_page(300, range(8, 130, 22))
    tall.save(tmp_path / "pages.tiff", save_all=True, append_images=[wide])
    cut = runpy.run_path(str(EXAMPLES / "document_ocr.py"))["cut"]
    strips = list(cut(tall, min_height=64))
    # Nothing is lost, and each strip ends between two lines.
    assert np.array_equal(np.concatenate([np.asarray(strip) for strip in strips]), np.asarray(tall))
    assert len(strips) == 4 and all(strip.height <= strip.width for strip in strips)
    assert all((np.asarray(strip)[-1] == 255).all() for strip in strips)
    assert [strip.size for strip in cut(wide, min_height=64)] == [wide.size]
    assert [strip.size for strip in cut(tall, min_height=490)] == [tall.size]

    options = ["--output", tmp_path / "text.txt", "--question", "Read.", "--max-new-tokens", 6]
    run("document_ocr.py", directory, tmp_path / "pages.tiff", *options)
    expected = [answer(loaded, strip, "Read.", 6) for strip in [*strips, wide]]
    assert (tmp_path / "text.txt").read_text(encoding="utf-8") == "\n".join(expected) + "\n"
    with pytest.raises(OSError, match="cannot identify image file"):
        run("document_ocr.py", directory, tmp_path / "text.txt")


def test_features(run, directory, golden, loaded, tmp_path):
    model, processor = loaded
    output = tmp_path / "features.png"
    printed = run("features.py", directory, golden.image_path("odd.jpg"), "--output", output).splitlines()
    features = model.get_image_features(golden.pixel_values(["odd.jpg"])).features
    unit = {name: torch.nn.functional.normalize(feature[0], dim=-1) for name, feature in features.items()}
    for line, (name, feature) in zip(printed, features.items(), strict=False):
        similarity = (unit[name] * unit["image"]).sum(-1).mean()
        assert line.split(None, 1) == [name, f"{tuple(feature.shape)}, cosine similarity to V: {similarity:.3f}"]
    config = model.config
    assert f"{(1, config.num_image_tokens, 4 * feature.shape[-1])}" in printed[4]
    assert f"{(config.num_image_tokens, config.text_config.hidden_size)}" in printed[5]
    painted = np.asarray(Image.open(output))
    assert painted.shape == (384, 4 * 384, 3)
    # Each position is a square of one colour.
    side = 384 // config.feature_grid_size
    squares = painted.reshape(-1, side, 4 * config.feature_grid_size, side, 3)
    assert (squares == squares[:, :1, :, :1]).all() and (squares.max((0, 2)) > squares.min((0, 2))).all()


@pytest.mark.slow
def test_finetuning(run, directory, golden, loaded, tmp_path):
    rows = [["image", "question", "answer"]]
    for name in golden.reference["images"]:
        shutil.copy(golden.image_path(name), tmp_path)
        rows.append([name, "What is its name?", name])
    with (tmp_path / "samples.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    options = ["--output", tmp_path / "adapter", "--held-out", 2, "--epochs", 2, "--learning-rate", 1e-2]
    printed = run("finetuning.py", directory, tmp_path / "samples.csv", *options)
    losses = [float(loss) for loss in re.findall(r"'eval_loss': '?([\d.]+)", printed)]
    assert losses[-1] < losses[0] and len(losses) == 3

    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(re.search(r"language_model\..*\.lora_[AB]\.weight", name) for name in adapter)
    assert all(tensor.any() for tensor in adapter.values())
    trained, processor = load_pretrained(tmp_path / "adapter", device_map="cpu")
    trained_answer = answer((trained.eval(), processor), golden.image(name), "What is its name?", 64)
    assert f"{name}: What is its name?\nExpected: {name}\nAnswer: {trained_answer}\n" in printed
    assert trained_answer != answer(loaded, golden.image(name), "What is its name?", 64)


@pytest.mark.parametrize(
    ("text", "message"),
    [("image,question\na.png,What?\n", "image, question and answer"), ("", "needs more than 10 rows")],
)
def test_finetuning_without_samples(run, tmp_path, text, message):
    (tmp_path / "samples.csv").write_text(text)
    assert message in " ".join(run("finetuning.py", "nowhere", tmp_path / "samples.csv", status=2).split())


def test_finetuning_with_a_missing_image(run, directory, tmp_path):
    (tmp_path / "samples.csv").write_text("image,question,answer\n" + "nowhere.png,What?,That.\n" * 3)
    with pytest.raises(SampleError, match="There is no image .*nowhere.png'; add it"):
        run("finetuning.py", directory, tmp_path / "samples.csv", "--held-out", 1, "--output", tmp_path / "out")


@pytest.mark.slow
def test_server_client(run, directory, golden, loaded):
    image = golden.image_path("odd.jpg")
    command = [sys.executable, "-m", "florence_vl_hf", "serve", str(directory), "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            server = re.search("http://[^ ]+/v1", process.stdout.readline()).group()
            options = ["--server", server, "--question", "What is it?", "--max-tokens", 6]
            printed = run("server_client.py", image, *options)
        finally:
            process.send_signal(signal.SIGINT)
    assert printed.strip() == answer(loaded, Image.open(image), "What is it?", 6)
    run("server_client.py", image, "--server", server, status=f"{server}: Connection error.")
