# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import json
import os
from pathlib import Path

import datasets
import pytest
import torch
from transformers.trainer_pt_utils import LengthGroupedSampler

from florence_vl_hf.training import data_loading
from florence_vl_hf.training.data_loading import ConversationFileError, load_conversations
from florence_vl_hf.training.samples import Problem, SampleError, to_messages

from .conversations import chat, llava, texts, write


@pytest.mark.parametrize("name", ["samples.json", "samples.jsonl"])
class TestFiles:
    def test_llava(self, image_folder, name):
        turns = [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "Compare <image> with\n<image>."},
            {"from": "gpt", "value": "Red, black."},
            {"from": "human", "value": "Sure?"},
            {"from": "gpt", "value": "Sí 😀"},
        ]
        samples = [
            {"id": 7, "image": ["a.png", "deep/ü b.jpg"], "conversations": turns, "score": 0.5, "model": ""},
            llava(id="one", image="deep/ü b.jpg"),
            llava("Hi", "Ho"),
        ]
        loaded = load_conversations(write(image_folder, samples, name))
        assert loaded["id"][:] == ["7", "one", "#3"]
        assert loaded["problem"][:] == [None] * 3
        assert loaded[0]["images"] == [str(image_folder / "a.png"), str(image_folder / "deep" / "ü b.jpg")]
        assert texts(to_messages(loaded[0])) == [
            ("system", ["Be brief."]),
            ("user", ["Compare ", "8x6", " with\n", "5x7", "."]),
            ("assistant", ["Red, black."]),
            ("user", ["Sure?"]),
            ("assistant", ["Sí 😀"]),
        ]
        assert texts(to_messages(loaded[1])) == [("user", ["5x7", "\nWhat?"]), ("assistant", ["Red."])]
        assert texts(to_messages(loaded[2])) == [("user", ["Hi"]), ("assistant", ["Ho"])]

    def test_chat(self, image_folder, name):
        items = [{"type": "text", "text": "Look: "}, {"type": "image"}, {"type": "text", "text": "What?"}]
        samples = [
            chat(items, [{"type": "text", "text": "Red."}], images=["a.png"], id="items"),
            chat("What? <image>", image="a.png"),
            chat("What?", images=["a.png", "a.png"]),
        ]
        loaded = [to_messages(sample) for sample in load_conversations(write(image_folder, samples, name))]
        assert texts(loaded[0]) == [("user", ["Look: ", "8x6", "What?"]), ("assistant", ["Red."])]
        assert texts(loaded[1]) == [("user", ["What? ", "8x6"]), ("assistant", ["Red."])]
        # As in TRL: text without image tokens, and images that come first.
        assert texts(loaded[2]) == [("user", ["8x6", "8x6", "What?"]), ("assistant", ["Red."])]

    def test_turns_of_either_format_in_either_list(self, image_folder, name):
        turns = {"llava": llava("Hi")["conversations"], "chat": chat("Hi")["messages"]}
        samples = [{"messages": turns["llava"]}, {"conversations": turns["chat"]}, {"messages": None, **llava("Hi")}]
        for sample in load_conversations(write(image_folder, samples, name)):
            assert texts(to_messages(sample)) == [("user", ["Hi"]), ("assistant", ["Red."])]

    @pytest.mark.parametrize("keys", [{}, {"image": None}, {"image": ""}, {"images": []}, {"images": None}])
    def test_without_image(self, image_folder, name, keys):
        sample = load_conversations(write(image_folder, [llava("Hi", **keys)], name))[0]
        assert sample["images"] == []
        assert texts(to_messages(sample))[0] == ("user", ["Hi"])

    @pytest.mark.parametrize("question", ["<image>", "<image>\nDescribe.", "Describe.\n<image>"])
    def test_captions(self, image_folder, name, question):
        sample = load_conversations(write(image_folder, [llava(question, "A square.", image="a.png")], name))[0]
        assert [item["type"] for item in sample["messages"][0]["content"]].count("image") == 1
        assert to_messages(sample)[1]["content"][0]["text"] == "A square."

    def test_byte_order_mark(self, image_folder, name):
        path = write(image_folder, [llava("Hi")], name)
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert texts(to_messages(load_conversations(path)[0]))[0] == ("user", ["Hi"])

    def test_lone_surrogates_are_replaced(self, image_folder, name):
        sample = load_conversations(write(image_folder, [llava("Hi \ud83d", id="\ud800")], name))[0]
        assert sample["id"] == "?"
        assert sample["messages"][0]["content"][0]["text"] == "Hi ?"

    def test_image_folder(self, image_folder, tmp_path, name):
        path = write(tmp_path, [llava(image="ü b.jpg")], name)
        sample = load_conversations(path, image_folder=image_folder / "deep")[0]
        assert texts(to_messages(sample))[0] == ("user", ["5x7", "\nWhat?"])
        with pytest.raises(SampleError, match="There is no image"):
            to_messages(load_conversations(path)[0])

    def test_a_changed_file_is_read_again(self, image_folder, name):
        path = write(image_folder, [llava("One")], name)
        before = load_conversations(path)
        status = path.stat()
        write(image_folder, [llava("Two")], name)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        assert path.stat().st_size == status.st_size
        assert texts(to_messages(load_conversations(path)[0]))[0] == ("user", ["Two"])
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert load_conversations(path).cache_files == before.cache_files
        assert Path(before.cache_files[0]["filename"]).is_relative_to(datasets.config.HF_DATASETS_CACHE)

    @pytest.mark.parametrize("content", ["", "\n\n"])
    def test_empty(self, image_folder, name, content):
        path = image_folder / name
        path.write_text(content, encoding="utf-8")
        with pytest.raises(ConversationFileError, match="has no samples|expected a JSON list"):
            load_conversations(path)

    def test_no_file(self, image_folder, name):
        with pytest.raises(ConversationFileError, match="There is no file"):
            load_conversations(image_folder / name)


class TestBrokenFiles:
    def test_empty_list(self, image_folder):
        with pytest.raises(ConversationFileError, match="has no samples"):
            load_conversations(write(image_folder, []))

    def test_truncated_json(self, image_folder):
        path = write(image_folder, [llava(id=i) for i in range(50)])
        path.write_bytes(path.read_bytes()[:-30])
        with pytest.raises(ConversationFileError, match="samples.json after sample 49: "):
            load_conversations(path)

    @pytest.mark.parametrize(
        "tail",
        [b", [" + b"[" * 100_000, b', {"id": "\xff"}]', b"] []", b", }]", b"{}]", b""],
    )
    def test_json_that_is_broken_after_a_sample(self, image_folder, tail):
        path = write(image_folder, [llava(id="one")])
        path.write_bytes(path.read_bytes()[:-1] + tail)
        with pytest.raises(ConversationFileError, match="Cannot read .*samples.json after sample [01]: "):
            load_conversations(path)

    @pytest.mark.parametrize("block_size", [3, 7, 100])
    def test_json_is_read_in_blocks(self, image_folder, monkeypatch, block_size):
        """Samples, numbers and white space may be split between blocks."""
        monkeypatch.setattr(data_loading, "BLOCK_SIZE", block_size)
        path = image_folder / "samples.json"
        path.write_text(f" [ \n{json.dumps(llava('Hi 😀'))} ,\n 123 ,-1.5e10,null\t, {json.dumps(llava(id=5))}\n ]\n ")
        samples = load_conversations(path)
        assert samples["id"][:] == ["#1", "#2", "#3", "#4", "5"]
        assert texts(to_messages(samples[0]))[0] == ("user", ["Hi 😀"])
        assert [message.split(",")[0] for message in samples["problem_message"][1:4]] == [
            "Got 123",
            "Got -15000000000.0",
            "Got nothing",
        ]

    @pytest.mark.parametrize("block_size", [7, 1 << 20])
    def test_values_that_python_does_not_decode(self, image_folder, monkeypatch, block_size):
        monkeypatch.setattr(data_loading, "BLOCK_SIZE", block_size)
        nested = '{"a": [' * 3000 + r'"}]} \"]", "\\"' + "]}" * 3000
        items = [json.dumps(llava("One")), "9" * 5000, f'{{"id": {"9" * 5000}}}', nested, json.dumps(llava("Two"))]
        for name, text in (("samples.json", f"[{', '.join(items)}]"), ("samples.jsonl", "\n".join(items))):
            (image_folder / name).write_text(text)
            samples = load_conversations(image_folder / name)
            assert [sample["problem"] for sample in samples] == [None, *["malformed sample"] * 3, None]
            assert "nested too deeply" in samples[3]["problem_message"]
            assert all(len(sample["id"]) <= 200 for sample in samples)

    def test_a_line_that_does_not_fit_in_memory(self, image_folder, monkeypatch):
        monkeypatch.setattr(data_loading, "MAX_SAMPLE_SIZE", 200)
        lines = [json.dumps(llava("One")), json.dumps(llava("x" * 1000)), " " * 500, json.dumps(llava("Two"))]
        (image_folder / "samples.jsonl").write_text("\n".join(lines))
        samples = load_conversations(image_folder / "samples.jsonl")
        assert [sample["problem"] is None for sample in samples] == [True, False, True]
        assert "Line 2 is not JSON (it is longer than 200 bytes)" in samples[1]["problem_message"]

    def test_json_that_is_not_a_list(self, image_folder):
        path = image_folder / "samples.json"
        path.write_text(json.dumps(llava()) + "\n" + json.dumps(llava()))
        with pytest.raises(ConversationFileError, match=r"expected a JSON list.*\.jsonl"):
            load_conversations(path)

    def test_lines_that_are_not_json(self, image_folder):
        path = image_folder / "samples.jsonl"
        lines = [json.dumps(llava("Hi")).encode(), b"", b'{"id": ', b"\xff", b"[" * 100_000, b"  ", b"null"]
        path.write_bytes(b"\r\n".join([*lines, json.dumps(llava("Ho", id="last")).encode()]))
        samples = load_conversations(path)
        assert samples["id"][:] == ["#1", "#3", "#4", "#5", "#7", "last"]
        assert [sample["problem"] is None for sample in samples] == [True, False, False, False, False, True]
        with pytest.raises(SampleError, match="Sample '#3': Line 3 is not JSON"):
            to_messages(samples[1])


class TestDatasets:
    @pytest.fixture
    def dataset(self, image_folder) -> datasets.Dataset:
        """In TRL's format: text content, images in the dataset."""
        path = str(image_folder / "a.png")
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

    def check(self, samples: datasets.Dataset) -> None:
        assert samples["id"][:] == ["#1", "#2"]
        assert {"id", "messages", "images", "length", "problem", "problem_message"} == set(samples.column_names)
        assert texts(to_messages(samples[0]))[0] == ("user", ["8x6", "8x6", "What?"])
        assert texts(to_messages(samples[1]))[0] == ("user", ["Hi"])

    def test_object(self, dataset):
        self.check(load_conversations(dataset))

    def test_selected_samples(self, dataset):
        samples = load_conversations(dataset.select([1, 0]))
        assert texts(to_messages(samples[1]))[0] == ("user", ["8x6", "8x6", "What?"])

    def test_saved_to_disk(self, dataset, tmp_path):
        dataset.save_to_disk(tmp_path / "saved")
        self.check(load_conversations(tmp_path / "saved"))

    def test_splits_saved_to_disk(self, dataset, tmp_path):
        datasets.DatasetDict({"val": dataset}).save_to_disk(tmp_path / "saved")
        self.check(load_conversations(tmp_path / "saved", split="val"))
        with pytest.raises(ConversationFileError, match="has no split 'train'; choose one of val"):
            load_conversations(tmp_path / "saved")

    @pytest.mark.parametrize("split", ["train", "test"])
    def test_parquet(self, dataset, tmp_path, split):
        dataset.to_parquet(tmp_path / "samples.parquet")
        self.check(load_conversations(tmp_path / "samples.parquet", split=split))

    def test_an_overwritten_file_is_read_again(self, dataset, tmp_path):
        dataset.to_parquet(tmp_path / "samples.parquet")
        load_conversations(tmp_path / "samples.parquet")
        dataset.select([1]).to_parquet(tmp_path / "samples.parquet")
        assert len(load_conversations(tmp_path / "samples.parquet")) == 1

    def test_items_with_unused_keys(self, image_folder):
        """Arrow gives every item every key."""
        items = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
        samples = [chat(items, [{"type": "text", "text": "Red."}], images=["deep/ü b.jpg"], id=3)]
        sample = load_conversations(datasets.Dataset.from_list(samples), image_folder=image_folder)[0]
        assert sample["id"] == "3"
        assert texts(to_messages(sample)) == [("user", ["5x7", "What?"]), ("assistant", ["Red."])]

    def test_one_image_per_sample(self, image_folder):
        samples = [chat("What?", image=str(image_folder / "a.png")), chat("Hi", image=None)]
        dataset = datasets.Dataset.from_list(samples).cast_column("image", datasets.Image())
        loaded = load_conversations(dataset)
        assert texts(to_messages(loaded[0]))[0] == ("user", ["8x6", "What?"])
        assert texts(to_messages(loaded[1]))[0] == ("user", ["Hi"])

    def test_a_broken_image_does_not_break_loading(self):
        samples = [chat("What?", images=[{"bytes": b"broken", "path": None}])]
        features = datasets.Features(
            {
                "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
                "images": datasets.List(datasets.Image()),
            }
        )
        sample = load_conversations(datasets.Dataset.from_list(samples, features=features))[0]
        with pytest.raises(SampleError) as caught:
            to_messages(sample)
        assert caught.value.problem is Problem.BROKEN_IMAGE

    def test_without_messages(self):
        with pytest.raises(ConversationFileError, match="has the columns text; expected `messages`"):
            load_conversations(datasets.Dataset.from_dict({"text": ["Hi"]}))


class TestLengths:
    def test_modalities_do_not_mix(self, image_folder):
        samples = [llava("word " * n, "word " * n) for n in (1, 3000, 5)]
        samples += [llava("<image>" * n, "Red.", image=["a.png"] * n) for n in (1, 3)]
        samples += [llava("<image>", "word " * 2000, image="a.png")]
        loaded = load_conversations(write(image_folder, [*samples, {}]))
        by_length = sorted(loaded, key=lambda sample: sample["length"])
        assert [sample["id"] for sample in by_length] == ["#7", "#1", "#3", "#2", "#4", "#6", "#5"]

    def test_images_of_a_dataset_count(self, image_folder):
        samples = [chat("What?" * 9, images=[]), chat("What?", images=[str(image_folder / "a.png")])]
        dataset = datasets.Dataset.from_list(samples).cast_column("images", datasets.List(datasets.Image()))
        lengths = load_conversations(dataset)["length"][:]
        assert 0 < lengths[0] < lengths[1]

    def test_the_trainers_sampler_makes_batches_of_one_modality(self, image_folder):
        samples = [llava(f"<image> {i}", image="a.png") if i % 3 else llava("word " * i) for i in range(96)]
        lengths = load_conversations(write(image_folder, samples))["length"][:]
        generator = torch.Generator().manual_seed(0)
        order = list(LengthGroupedSampler(4, lengths=lengths, generator=generator))
        mixed = sum(len({i % 3 > 0 for i in order[start : start + 4]}) > 1 for start in range(0, 96, 4))
        assert sorted(order) == list(range(96))
        assert mixed <= 2
