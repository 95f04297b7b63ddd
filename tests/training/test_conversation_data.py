# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import json
import os
import pickle
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from transformers.trainer_pt_utils import LengthGroupedSampler

from florence_vl_hf.training.conversation_data import (
    ConversationFileError,
    Problem,
    SampleError,
    load_conversations,
    to_messages,
    with_lengths,
)

from .conversations import chat, llava, write


def load_one(picture_folder: Path, row: Any) -> dict[str, Any]:
    return load_conversations(write(picture_folder, [row]))[0]


def problem_of(picture_folder: Path, row: Any) -> tuple[Problem, str]:
    with pytest.raises(SampleError) as caught:
        to_messages(load_one(picture_folder, row))
    return caught.value.problem, str(caught.value)


def texts(messages: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Messages in short: a picture as its size."""
    return [
        (m["role"], [i["text"] if i["type"] == "text" else "x".join(map(str, i["image"].size)) for i in m["content"]])
        for m in messages
    ]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
class TestFiles:
    def test_llava(self, picture_folder, name):
        turns = [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "Compare <image> with\n<image>."},
            {"from": "gpt", "value": "Red, black."},
            {"from": "human", "value": "Sure?"},
            {"from": "gpt", "value": "Sí 😀"},
        ]
        rows = [
            {"id": 7, "image": ["a.png", "deep/ü b.jpg"], "conversations": turns, "score": 0.5, "model": ""},
            llava(id="one", image="deep/ü b.jpg"),
            llava("Hi", "Ho"),
        ]
        loaded = load_conversations(write(picture_folder, rows, name))
        assert loaded["id"][:] == ["7", "one", "row 3"]
        assert loaded["problem"][:] == [None] * 3
        assert loaded[0]["images"] == [str(picture_folder / "a.png"), str(picture_folder / "deep" / "ü b.jpg")]
        assert texts(to_messages(loaded[0])) == [
            ("system", ["Be brief."]),
            ("user", ["Compare ", "8x6", " with\n", "5x7", "."]),
            ("assistant", ["Red, black."]),
            ("user", ["Sure?"]),
            ("assistant", ["Sí 😀"]),
        ]
        assert texts(to_messages(loaded[1])) == [("user", ["5x7", "\nWhat?"]), ("assistant", ["Red."])]
        assert texts(to_messages(loaded[2])) == [("user", ["Hi"]), ("assistant", ["Ho"])]

    def test_chat(self, picture_folder, name):
        items = [{"type": "text", "text": "Look: "}, {"type": "image"}, {"type": "text", "text": "What?"}]
        rows = [
            chat(items, [{"type": "text", "text": "Red."}], images=["a.png"], id="items"),
            chat("What? <image>", image="a.png"),
            chat("What?", images=["a.png", "a.png"]),
        ]
        loaded = [to_messages(row) for row in load_conversations(write(picture_folder, rows, name))]
        assert texts(loaded[0]) == [("user", ["Look: ", "8x6", "What?"]), ("assistant", ["Red."])]
        assert texts(loaded[1]) == [("user", ["What? ", "8x6"]), ("assistant", ["Red."])]
        # As TRL has it: text without marks, and pictures that come first.
        assert texts(loaded[2]) == [("user", ["8x6", "8x6", "What?"]), ("assistant", ["Red."])]

    @pytest.mark.parametrize("keys", [{}, {"image": None}, {"image": ""}, {"images": []}, {"images": None}])
    def test_without_picture(self, picture_folder, name, keys):
        row = load_conversations(write(picture_folder, [llava("Hi", **keys)], name))[0]
        assert row["images"] == []
        assert texts(to_messages(row))[0] == ("user", ["Hi"])

    @pytest.mark.parametrize("question", ["<image>", "<image>\nDescribe.", "Describe.\n<image>"])
    def test_captions(self, picture_folder, name, question):
        row = load_conversations(write(picture_folder, [llava(question, "A square.", image="a.png")], name))[0]
        assert [item["type"] for item in row["messages"][0]["content"]].count("image") == 1
        assert to_messages(row)[1]["content"][0]["text"] == "A square."

    def test_byte_order_mark(self, picture_folder, name):
        path = write(picture_folder, [llava("Hi")], name)
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert texts(to_messages(load_conversations(path)[0]))[0] == ("user", ["Hi"])

    def test_half_characters_are_replaced(self, picture_folder, name):
        row = load_conversations(write(picture_folder, [llava("Hi \ud83d", id="\ud800")], name))[0]
        assert row["id"] == "?"
        assert row["messages"][0]["content"][0]["text"] == "Hi ?"

    def test_image_folder(self, picture_folder, tmp_path, name):
        path = write(tmp_path, [llava(image="ü b.jpg")], name)
        row = load_conversations(path, image_folder=picture_folder / "deep")[0]
        assert texts(to_messages(row))[0] == ("user", ["5x7", "\nWhat?"])
        with pytest.raises(SampleError, match="no picture"):
            to_messages(load_conversations(path)[0])

    def test_a_changed_file_is_read_again(self, picture_folder, name):
        path = write(picture_folder, [llava("One")], name)
        before = load_conversations(path)
        status = path.stat()
        write(picture_folder, [llava("Two")], name)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        assert path.stat().st_size == status.st_size
        assert texts(to_messages(load_conversations(path)[0]))[0] == ("user", ["Two"])
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert load_conversations(path).cache_files == before.cache_files
        assert Path(before.cache_files[0]["filename"]).is_relative_to(datasets.config.HF_DATASETS_CACHE)

    @pytest.mark.parametrize("content", ["", "\n\n"])
    def test_empty(self, picture_folder, name, content):
        path = picture_folder / name
        path.write_text(content, encoding="utf-8")
        with pytest.raises(ConversationFileError, match="holds no samples|expected a JSON list"):
            load_conversations(path)

    def test_no_file(self, picture_folder, name):
        with pytest.raises(ConversationFileError, match="There is no file"):
            load_conversations(picture_folder / name)


class TestBrokenFiles:
    def test_no_entries(self, picture_folder):
        with pytest.raises(ConversationFileError, match="holds no samples"):
            load_conversations(write(picture_folder, []))

    def test_json_that_breaks_off(self, picture_folder):
        path = write(picture_folder, [llava(id=i) for i in range(50)])
        path.write_bytes(path.read_bytes()[:-30])
        with pytest.raises(ConversationFileError, match="rows.json is broken after its row 49: .*premature EOF"):
            load_conversations(path)

    def test_json_that_is_no_list(self, picture_folder):
        path = picture_folder / "rows.json"
        path.write_text(json.dumps(llava()) + "\n" + json.dumps(llava()))
        with pytest.raises(ConversationFileError, match=r"expected a JSON list.*\.jsonl"):
            load_conversations(path)

    def test_lines_that_are_no_json(self, picture_folder):
        path = picture_folder / "rows.jsonl"
        lines = [json.dumps(llava("Hi")).encode(), b"", b'{"id": ', b"\xff", b"[" * 100_000, b"  ", b"null"]
        path.write_bytes(b"\r\n".join([*lines, json.dumps(llava("Ho", id="last")).encode()]))
        rows = load_conversations(path)
        assert rows["id"][:] == ["row 1", "row 3", "row 4", "row 5", "row 7", "last"]
        assert [row["problem"] is None for row in rows] == [True, False, False, False, False, True]
        with pytest.raises(SampleError, match="Sample 'row 3': line 3 is no JSON"):
            to_messages(rows[1])


class TestBrokenRows:
    @pytest.mark.parametrize(
        "row",
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
    def test_form(self, picture_folder, row):
        kind, message = problem_of(picture_folder, row)
        assert kind is Problem.FORM
        assert message.startswith("Sample ")
        assert "expected" in message

    @pytest.mark.parametrize(
        "path", ["../a.png", "/etc/passwd", "deep/../../a.png", "..", ".", "deep/../../data2/a.png"]
    )
    def test_paths_out_of_the_folder(self, picture_folder, path):
        kind, message = problem_of(picture_folder, llava(image=path, id="evil"))
        assert kind is Problem.OUTSIDE
        assert message.startswith("Sample 'evil': ")

    def test_paths_that_stay_in_the_folder(self, picture_folder, tmp_path):
        (tmp_path / "elsewhere.png").write_bytes((picture_folder / "a.png").read_bytes())
        (picture_folder / "link.png").symlink_to(tmp_path / "elsewhere.png")
        for path in ("link.png", "deep/../a.png", "./a.png", str(picture_folder / "a.png")):
            assert texts(to_messages(load_one(picture_folder, llava(image=path))))[0] == ("user", ["8x6", "\nWhat?"])

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
    def test_roles(self, picture_folder, roles):
        kind, message = problem_of(
            picture_folder, {"conversations": [{"from": role, "value": "Hi"} for role in roles]}
        )
        assert kind is Problem.ROLES

    @pytest.mark.parametrize(
        "row",
        [
            llava("Hi", image="a.png"),
            llava("<image>"),
            llava("<image> <image>", image="a.png"),
            llava("<image>", image=["a.png", "a.png"]),
            llava("Hi", "<image>", image="a.png"),
            llava("<image>", "<image>", image=["a.png", "a.png"]),
            chat("Hi", [{"type": "image"}], images=["a.png"]),
            chat([{"type": "text", "text": "Hi"}], images=["a.png"]),
        ],
        ids=str,
    )
    def test_marks(self, picture_folder, row):
        assert problem_of(picture_folder, row)[0] is Problem.MARKS

    @pytest.mark.parametrize("path", ["no.png", "deep", "a\0b.png", "x" * 5000, "http://example.com/a.png"])
    def test_missing_pictures(self, picture_folder, path):
        kind, message = problem_of(picture_folder, llava(image=path, id="lost"))
        assert kind is Problem.MISSING
        assert message.startswith("Sample 'lost': ")

    def test_broken_pictures(self, picture_folder, monkeypatch):
        whole = BytesIO()
        Image.effect_noise((64, 64), 50).save(whole, "PNG")
        damaged = {
            "truncated.png": whole.getvalue()[:-600],
            "empty.png": b"",
            "text.png": b"no picture",
            "header.png": whole.getvalue()[:20],
        }
        for name, content in damaged.items():
            (picture_folder / name).write_bytes(content)
            kind, message = problem_of(picture_folder, llava(image=name, id="torn"))
            assert kind is Problem.BROKEN
            assert name in message
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
        kind, message = problem_of(picture_folder, llava(image="a.png"))
        assert (kind, "bomb" in message) == (Problem.BROKEN, True)

    def test_an_error_comes_back_from_another_process(self, picture_folder):
        with pytest.raises(SampleError) as caught:
            to_messages(load_one(picture_folder, llava("Hi", image="a.png")))
        returned = pickle.loads(pickle.dumps(caught.value))
        assert (returned.problem, str(returned)) == (Problem.MARKS, str(caught.value))


class TestPictures:
    def test_pixels_are_the_goldens(self, golden, processor):
        """Grey, palette and RGBA among them: what comes out is RGB, and the recorded pixels."""
        names = golden.reference["images"]
        rows = [chat("<image>", images=[str(golden.image_path(name))]) for name in names]
        pictures = [to_messages(row)[0]["content"][0]["image"] for row in rows]
        assert {picture.mode for picture in pictures} == {"RGB"}
        pixel_values = processor.image_processor(pictures, return_tensors="pt").pixel_values
        difference = (pixel_values - golden.tensors["pixel_values"]).abs()
        assert (difference <= 1e-6).float().mean() >= 0.999
        assert difference.max() <= 1 / 255 / min(processor.image_processor.image_std) + 1e-6

    def test_as_the_processor_opens_paths(self, picture_folder, processor):
        pixels = torch.randint(0, 256, (8, 6, 4), dtype=torch.uint8, generator=torch.manual_seed(0)).numpy()
        exif = Image.Exif()
        exif[Image.ExifTags.Base.Orientation] = 6
        Image.fromarray(pixels, "RGBA").save(picture_folder / "clear.png")
        Image.fromarray(pixels[..., :3]).save(picture_folder / "turned.png", exif=exif)
        Image.fromarray(pixels[..., :3]).quantize(8).save(picture_folder / "palette.gif", transparency=0)
        for name in ("clear.png", "turned.png", "palette.gif"):
            picture = to_messages(load_one(picture_folder, llava(image=name)))[0]["content"][0]["image"]
            expected = processor.image_processor.fetch_images(str(picture_folder / name))
            assert (picture.mode, picture.size) == (expected.mode, expected.size)
            assert picture.tobytes() == expected.tobytes()
        assert to_messages(load_one(picture_folder, llava(image="turned.png")))[0]["content"][0]["image"].size == (
            8,
            6,
        )

    @pytest.mark.parametrize("form", ["image", "path", "bytes", "path in dict"])
    def test_forms(self, picture_folder, form):
        path = picture_folder / "a.png"
        picture = {
            "image": Image.open(path),
            "path": path,
            "bytes": {"bytes": path.read_bytes(), "path": "elsewhere.png"},
            "path in dict": {"bytes": None, "path": str(path)},
        }[form]
        messages = to_messages(chat("<image>", images=[picture]))
        assert texts(messages)[0] == ("user", ["8x6"])
        assert to_messages(chat("<image>", image=picture))[0]["content"][0]["image"].size == (8, 6)

    def test_files_are_closed(self, picture_folder):
        """Even while the errors, whose tracebacks hold what was being read, are kept."""
        (picture_folder / "torn.png").write_bytes((picture_folder / "a.png").read_bytes()[:50])
        row = load_one(picture_folder, llava(image="torn.png"))
        num_open, errors = len(os.listdir("/proc/self/fd")), []
        for _ in range(5):
            with pytest.raises(SampleError) as caught:
                to_messages(row)
            errors.append(caught.value)
        assert len(os.listdir("/proc/self/fd")) == num_open
        assert len(errors) == 5


class TestDatasets:
    @pytest.fixture
    def dataset(self, picture_folder) -> datasets.Dataset:
        """As users of TRL have it: text content, pictures in the dataset."""
        path = str(picture_folder / "a.png")
        columns = {
            "messages": [chat("What?")["messages"], chat("Hi")["messages"]],
            "images": [[path, path], []],
            "source": ["x", "y"],
        }
        features = datasets.Features(
            {
                "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
                "images": datasets.List(datasets.Image()),
                "source": datasets.Value("string"),
            }
        )
        return datasets.Dataset.from_dict(columns, features=features)

    def check(self, rows: datasets.Dataset) -> None:
        assert rows["id"][:] == ["row 1", "row 2"]
        assert {"id", "messages", "images", "problem", "length"} == set(rows.column_names)
        assert texts(to_messages(rows[0]))[0] == ("user", ["8x6", "8x6", "What?"])
        assert texts(to_messages(rows[1]))[0] == ("user", ["Hi"])
        assert rows["length"][0] > rows["length"][1]

    def test_object(self, dataset):
        self.check(load_conversations(dataset))

    def test_selected_rows(self, dataset):
        rows = load_conversations(dataset.select([1, 0]))
        assert texts(to_messages(rows[1]))[0] == ("user", ["8x6", "8x6", "What?"])

    def test_saved_to_disk(self, dataset, tmp_path):
        dataset.save_to_disk(tmp_path / "saved")
        self.check(load_conversations(tmp_path / "saved"))

    def test_splits_saved_to_disk(self, dataset, tmp_path):
        datasets.DatasetDict({"val": dataset}).save_to_disk(tmp_path / "saved")
        self.check(load_conversations(tmp_path / "saved", split="val"))
        with pytest.raises(ConversationFileError, match="has the splits val, but no 'train'"):
            load_conversations(tmp_path / "saved")

    @pytest.mark.parametrize("split", ["train", "test"])
    def test_parquet(self, dataset, tmp_path, split):
        dataset.to_parquet(tmp_path / "rows.parquet")
        self.check(load_conversations(tmp_path / "rows.parquet", split=split))

    def test_a_folder_written_anew_is_read_anew(self, dataset, tmp_path):
        dataset.to_parquet(tmp_path / "rows.parquet")
        load_conversations(tmp_path / "rows.parquet")
        dataset.select([1]).to_parquet(tmp_path / "rows.parquet")
        assert len(load_conversations(tmp_path / "rows.parquet")) == 1

    def test_typed_items_with_holes(self, picture_folder):
        """Arrow gives every item every key."""
        items = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
        rows = [chat(items, [{"type": "text", "text": "Red."}], images=["deep/ü b.jpg"], id=3)]
        row = load_conversations(datasets.Dataset.from_list(rows), image_folder=picture_folder)[0]
        assert row["id"] == "3"
        assert texts(to_messages(row)) == [("user", ["5x7", "What?"]), ("assistant", ["Red."])]

    def test_one_picture_per_row(self, picture_folder):
        rows = [chat("What?", image=str(picture_folder / "a.png")), chat("Hi", image=None)]
        dataset = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
        loaded = load_conversations(dataset)
        assert texts(to_messages(loaded[0]))[0] == ("user", ["8x6", "What?"])
        assert texts(to_messages(loaded[1]))[0] == ("user", ["Hi"])

    def test_a_broken_picture_does_not_break_its_row(self):
        rows = [chat("What?", images=[{"bytes": b"torn", "path": None}])]
        features = datasets.Features(
            {
                "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
                "images": datasets.List(datasets.Image()),
            }
        )
        row = load_conversations(datasets.Dataset.from_list(rows, features=features))[0]
        with pytest.raises(SampleError) as caught:
            to_messages(row)
        assert caught.value.problem is Problem.BROKEN

    def test_without_messages(self):
        with pytest.raises(ConversationFileError, match="has the columns text; expected `messages`"):
            load_conversations(datasets.Dataset.from_dict({"text": ["Hi"]}))


class TestLengths:
    def test_modalities_do_not_mix(self, picture_folder):
        rows = [llava("word " * n, "word " * n) for n in (1, 3000, 5)]
        rows += [llava("<image>" * n, "Red.", image=["a.png"] * n) for n in (1, 3)]
        rows += [llava("<image>", "word " * 2000, image="a.png")]
        loaded = load_conversations(write(picture_folder, [*rows, {}]))
        by_length = sorted(loaded, key=lambda row: row["length"])
        assert [len(row["images"]) for row in by_length] == [0, 0, 0, 0, 1, 3, 1]
        anew = with_lengths(loaded, tokens_per_image=5000)
        assert [len(row["images"]) for row in sorted(anew, key=lambda row: row["length"])] == [0, 0, 0, 0, 1, 1, 3]
        assert anew.column_names.count("length") == 1
        assert with_lengths(anew)["length"][:] == loaded["length"][:]

    def test_trainers_sampler_makes_batches_of_one_kind(self, picture_folder):
        rows = [llava(f"<image> {i}", image="a.png") if i % 3 else llava("word " * i) for i in range(96)]
        lengths = load_conversations(write(picture_folder, rows))["length"][:]
        generator = torch.Generator().manual_seed(0)
        order = list(LengthGroupedSampler(4, lengths=lengths, generator=generator))
        mixed = sum(len({i % 3 > 0 for i in order[start : start + 4]}) > 1 for start in range(0, 96, 4))
        assert sorted(order) == list(range(96))
        assert mixed <= 2
