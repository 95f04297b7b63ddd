# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import os
import pickle
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from florence_vl_hf.training.data_loading import load_conversations
from florence_vl_hf.training.samples import Problem, SampleError, to_messages

from .conversations import chat, llava, texts, write


def load_one(image_folder: Path, sample: Any) -> dict[str, Any]:
    return load_conversations(write(image_folder, [sample]))[0]


def problem_of(image_folder: Path, sample: Any) -> tuple[Problem, str]:
    with pytest.raises(SampleError) as caught:
        to_messages(load_one(image_folder, sample))
    return caught.value.problem, str(caught.value)


class TestBrokenSamples:
    @pytest.mark.parametrize(
        "sample",
        [
            3,
            [],
            None,
            {},
            {"id": 1, "conversations": []},
            {"conversations": "Hi"},
            {"conversations": [3]},
            {"conversations": [{"from": "human"}]},
            {"conversations": [{"from": "human", "value": 3}]},
            {"conversations": [{"from": "human", "value": [{"type": "text", "text": "Hi"}]}]},
            {"conversations": [{"from": "user", "value": "Hi"}]},
            {"conversations": [{"from": ["human"], "value": "Hi"}]},
            {"messages": [{"role": "human", "content": "Hi"}]},
            chat([{"type": "video"}]),
            chat(["Hi"]),
            chat([{"type": "text"}]),
            chat(None),
            llava(image=3),
            llava(image={"path": "a.png"}),
            llava(image=["a.png", None]),
            llava(image=[""]),
            llava(image=0.5),
        ],
        ids=str,
    )
    def test_malformed(self, image_folder, sample):
        problem, message = problem_of(image_folder, sample)
        assert problem is Problem.MALFORMED
        assert message.startswith("Sample ")
        assert "expected" in message

    @pytest.mark.parametrize(
        "path", ["../a.png", "/etc/passwd", "deep/../../a.png", "..", ".", "deep/../../data2/a.png"]
    )
    def test_paths_outside_of_the_image_folder(self, image_folder, path):
        problem, message = problem_of(image_folder, llava(image=path, id="evil"))
        assert problem is Problem.OUTSIDE_IMAGE_FOLDER
        assert message.startswith("Sample 'evil': ")

    def test_paths_inside_of_the_image_folder(self, image_folder, tmp_path):
        (tmp_path / "elsewhere.png").write_bytes((image_folder / "a.png").read_bytes())
        (image_folder / "link.png").symlink_to(tmp_path / "elsewhere.png")
        for path in ("link.png", "deep/../a.png", "./a.png", str(image_folder / "a.png")):
            assert texts(to_messages(load_one(image_folder, llava(image=path))))[0] == ("user", ["8x6", "\nWhat?"])

    @pytest.mark.parametrize(
        "roles",
        [
            ["gpt", "human"],
            ["human"],
            ["human", "gpt", "human"],
            ["human", "human", "gpt"],
            ["human", "gpt", "gpt"],
            ["human", "system", "gpt"],
            ["system"],
            ["system", "system", "human", "gpt"],
        ],
        ids=str,
    )
    def test_roles(self, image_folder, roles):
        problem, message = problem_of(
            image_folder, {"conversations": [{"from": role, "value": "Hi"} for role in roles]}
        )
        assert problem is Problem.ROLE_ORDER

    @pytest.mark.parametrize(
        "sample",
        [
            llava("Hi", image="a.png"),
            llava("<image>"),
            llava("<image> <image>", image="a.png"),
            llava("<image>", image=["a.png", "a.png"]),
            llava("Hi", "<image>", image="a.png"),
            llava("<image>", "<image>", image=["a.png", "a.png"]),
            chat("Hi", [{"type": "image"}], images=["a.png"]),
            chat([{"type": "text", "text": "Hi"}], images=["a.png"]),
            # Tokens that arise where the chat template joins the parts of a message.
            llava("<im<image>age>\nhi", image="a.png"),
            chat([{"type": "text", "text": "<ima"}, {"type": "text", "text": "ge>"}]),
            chat(
                [{"type": "text", "text": "<ima"}, {"type": "image"}, {"type": "text", "text": "ge>"}], image="a.png"
            ),
            chat("Hi", [{"type": "text", "text": "<ima"}, {"type": "text", "text": "ge>"}]),
        ],
        ids=str,
    )
    def test_image_tokens(self, image_folder, sample):
        assert problem_of(image_folder, sample)[0] is Problem.IMAGE_TOKENS

    @pytest.mark.parametrize("path", ["no.png", "deep", "a\0b.png", "x" * 5000, "http://example.com/a.png"])
    def test_missing_images(self, image_folder, path):
        problem, message = problem_of(image_folder, llava(image=path, id="lost"))
        assert problem is Problem.MISSING_IMAGE
        assert message.startswith("Sample 'lost': ")

    def test_broken_images(self, image_folder, monkeypatch):
        complete = BytesIO()
        Image.effect_noise((64, 64), 50).save(complete, "PNG")
        damaged = {
            "truncated.png": complete.getvalue()[:-600],
            "empty.png": b"",
            "text.png": b"not an image",
            "header.png": complete.getvalue()[:20],
        }
        for name, content in damaged.items():
            (image_folder / name).write_bytes(content)
            problem, message = problem_of(image_folder, llava(image=name, id="broken"))
            assert problem is Problem.BROKEN_IMAGE
            assert name in message
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
        problem, message = problem_of(image_folder, llava(image="a.png"))
        assert (problem, "bomb" in message) == (Problem.BROKEN_IMAGE, True)

    @pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (100_000, 1), (12_001, 12_001)])
    def test_images_that_are_too_large(self, image_folder, size):
        """A square of 20,000 pixels takes gigabytes, however small the file is."""
        Image.new("1", size).save(image_folder / "large.png")
        sample = load_one(image_folder, llava(image="large.png", id="large"))
        begin = time.perf_counter()
        with pytest.raises(
            SampleError, match=r"'large'.*large.png.* pixels, more than `max_image_side: 12000`"
        ) as caught:
            to_messages(sample)
        assert caught.value.problem is Problem.BROKEN_IMAGE
        assert time.perf_counter() - begin < 1
        content = (image_folder / "large.png").read_bytes()
        for image in ({"bytes": content, "path": None}, Image.open(image_folder / "large.png")):
            with pytest.raises(SampleError, match="max_image_side"):
                to_messages(chat("<image>", images=[image]))

    def test_large_images_of_real_data(self, image_folder):
        Image.new("1", (12_000, 300)).save(image_folder / "panorama.png")
        image = to_messages(load_one(image_folder, llava(image="panorama.png")))[0]["content"][0]["image"]
        assert image.size == (12_000, 300)

    def test_a_program_is_not_run(self, image_folder):
        """Pillow would start Ghostscript."""
        header = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n{} loop\n"
        (image_folder / "a.eps").write_bytes(header)
        problem, message = problem_of(image_folder, llava(image="a.eps"))
        assert (problem, "EPS" in message) == (Problem.BROKEN_IMAGE, True)

    def test_a_pipe_is_no_image(self, image_folder):
        os.mkfifo(image_folder / "pipe.png")
        assert problem_of(image_folder, llava(image="pipe.png"))[0] is Problem.MISSING_IMAGE

    @pytest.mark.parametrize("sample", [3, None, "Hi", [], {}, {"problem_message": None}, {"messages": 10**5000}])
    def test_python_objects_of_any_kind(self, sample):
        with pytest.raises(SampleError, match="expected an object with a list of turns"):
            to_messages(sample)

    def test_values_that_have_no_text(self):
        nested: Any = []
        for _ in range(100_000):
            nested = [nested]
        for value in (nested, 10**5000, {"role": nested}, {"role": 10**5000}, "x" * 10**7):
            with pytest.raises(SampleError, match="Got the turn") as caught:
                to_messages({"id": 10**5000, "messages": [value]})
            assert len(str(caught.value)) < 300

    def test_an_error_comes_back_from_another_process(self, image_folder):
        with pytest.raises(SampleError) as caught:
            to_messages(load_one(image_folder, llava("Hi", image="a.png")))
        returned = pickle.loads(pickle.dumps(caught.value))
        assert (returned.problem, str(returned)) == (Problem.IMAGE_TOKENS, str(caught.value))


class TestImages:
    def test_pixels_equal_the_originals(self, golden, processor):
        """Grey, palette and RGBA among them: what comes out is RGB, and the recorded pixels."""
        names = golden.reference["images"]
        samples = [chat("<image>", images=[str(golden.image_path(name))]) for name in names]
        images = [to_messages(sample)[0]["content"][0]["image"] for sample in samples]
        assert {image.mode for image in images} == {"RGB"}
        pixel_values = processor.image_processor(images, return_tensors="pt").pixel_values
        difference = (pixel_values - golden.tensors["pixel_values"]).abs()
        assert (difference <= 1e-6).float().mean() >= 0.999
        assert difference.max() <= 1 / 255 / min(processor.image_processor.image_std) + 1e-6

    def test_as_the_processor_opens_paths(self, image_folder, processor):
        pixels = torch.randint(0, 256, (8, 6, 4), dtype=torch.uint8, generator=torch.manual_seed(0)).numpy()
        exif = Image.Exif()
        exif[Image.ExifTags.Base.Orientation] = 6
        Image.fromarray(pixels, "RGBA").save(image_folder / "clear.png")
        Image.fromarray(pixels[..., :3]).save(image_folder / "turned.png", exif=exif)
        Image.fromarray(pixels[..., :3]).quantize(8).save(image_folder / "palette.gif", transparency=0)
        for name in ("clear.png", "turned.png", "palette.gif"):
            image = to_messages(load_one(image_folder, llava(image=name)))[0]["content"][0]["image"]
            expected = processor.image_processor.fetch_images(str(image_folder / name))
            assert (image.mode, image.size) == (expected.mode, expected.size)
            assert image.tobytes() == expected.tobytes()
        assert to_messages(load_one(image_folder, llava(image="turned.png")))[0]["content"][0]["image"].size == (
            8,
            6,
        )

    @pytest.mark.parametrize(
        ("name", "mode"),
        [("a.jpg", "CMYK"), ("b.png", "I;16"), ("c.png", "LA"), ("d.tif", "F"), ("e.gif", "P"), ("f.png", "1")],
    )
    def test_modes(self, image_folder, name, mode):
        image = Image.new(mode, (8, 6))
        image.save(
            image_folder / name, save_all=name.endswith("gif"), append_images=[image] * 2 * name.endswith("gif")
        )
        opened = to_messages(load_one(image_folder, llava(image=name)))[0]["content"][0]["image"]
        assert (opened.mode, opened.size) == ("RGB", (8, 6))

    @pytest.mark.parametrize("form", ["image", "path", "bytes", "path in dict"])
    def test_forms(self, image_folder, form):
        path = image_folder / "a.png"
        image = {
            "image": Image.open(path),
            "path": path,
            "bytes": {"bytes": path.read_bytes(), "path": "elsewhere.png"},
            "path in dict": {"bytes": None, "path": str(path)},
        }[form]
        messages = to_messages(chat("<image>", images=[image]))
        assert texts(messages)[0] == ("user", ["8x6"])
        assert to_messages(chat("<image>", image=image))[0]["content"][0]["image"].size == (8, 6)

    @pytest.mark.parametrize("image", [3, ["a.png"], {"bytes": None, "path": None}, {}], ids=str)
    def test_unreadable_forms(self, image):
        with pytest.raises(SampleError, match="Cannot read the image"):
            to_messages(chat("<image>", images=[image]))

    def test_files_are_closed(self, image_folder):
        """Even while the errors, whose tracebacks hold what was being read, are kept."""
        (image_folder / "broken.png").write_bytes((image_folder / "a.png").read_bytes()[:50])
        sample = load_one(image_folder, llava(image="broken.png"))
        num_open, errors = len(os.listdir("/proc/self/fd")), []
        for _ in range(5):
            with pytest.raises(SampleError) as caught:
                to_messages(sample)
            errors.append(caught.value)
        assert len(os.listdir("/proc/self/fd")) == num_open
        assert len(errors) == 5
