# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import json
import os
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from florence_vl_hf.processing import FlorenceVLProcessor
from florence_vl_hf.training import FlorenceVLCollator
from florence_vl_hf.training.check_data import DataReport, SampleCheck, check_data, format_report
from florence_vl_hf.training.data_loading import load_conversations
from florence_vl_hf.training.samples import Problem, SampleError, to_messages

from ..conftest import status
from .conversations import chat, llava, write


def run(path: Path, *options: str) -> int:
    """The command's exit status."""
    return status("check-data", path, "--workers", "0", *options)


def check(path: Path, processor: FlorenceVLProcessor | None = None, **options: Any) -> DataReport:
    return check_data(load_conversations(path), processor, **{"num_workers": 0, **options})


class TestCommand:
    def test_valid(self, image_folder, capsys):
        samples = [
            llava(image="a.png", id=0),
            llava("Hi", "Ho"),
            llava("<image><image>", image=["a.png", "deep/ü b.jpg"]),
        ]
        samples[1]["conversations"] *= 3
        assert run(write(image_folder, samples)) == 0
        out = capsys.readouterr().out
        assert out.startswith("3 samples: 2 with images (3 images), 1 without; 1.7 turns on average, 3 at most.\n")
        assert "set --model" in out
        assert out.endswith("All 3 samples are valid.\n")

    def test_every_problem_is_named(self, image_folder, tmp_path, capsys):
        (image_folder / "broken.png").write_bytes((image_folder / "a.png").read_bytes()[:50])
        samples = [
            llava(image="a.png"),
            {"id": 8, "conversations": "Hi"},
            llava(image="../../secret.png", id="evil"),
            llava(image="lost.png", id="größe"),
            llava("<image><image>", image=["broken.png", "lost.png"], id="broken"),
            llava(id="no image"),
            {"id": "reversed", "conversations": llava()["conversations"][::-1]},
            llava("Hi", " \n", id="empty"),
        ]
        report_file = tmp_path / "report.jsonl"
        assert run(write(image_folder, samples, "samples.jsonl"), "--report", str(report_file)) == 1
        out = capsys.readouterr().out
        lines = [json.loads(line) for line in report_file.read_text(encoding="utf-8").splitlines()]
        found = [(line["id"], line["problem"]) for line in lines]
        assert found == [
            ("8", Problem.MALFORMED),
            ("evil", Problem.OUTSIDE_IMAGE_FOLDER),
            ("größe", Problem.MISSING_IMAGE),
            ("broken", Problem.BROKEN_IMAGE),
            ("broken", Problem.MISSING_IMAGE),
            ("no image", Problem.IMAGE_TOKENS),
            ("reversed", Problem.ROLE_ORDER),
            ("empty", Problem.NOTHING_TO_LEARN),
        ]
        assert all(f"  {line['message']}\n" in out for line in lines)
        assert all(f"Sample {line['id']!r}: " in line["message"] for line in lines)
        assert "missing image: 2\n" in out
        assert "8 samples: 3 with images (4 images), 1 without, 4 unreadable;" in out
        assert out.endswith("7 of 8 samples have problems.\n")

    def test_a_report_overwrites_only_reports(self, image_folder, tmp_path, capsys):
        path = write(image_folder, [llava(image="lost.png")], "samples.jsonl")
        before = path.read_bytes()
        assert run(path, "--report", str(path)) == 1
        assert f"{path} exists and is not a report" in capsys.readouterr().err
        assert path.read_bytes() == before
        report_file = tmp_path / "report.jsonl"
        for image, num_lines in (("lost.png", 1), ("a.png", 0), ("lost.png", 1)):
            write(image_folder, [llava("<image>" + "!" * num_lines, image=image)], "samples.jsonl")
            run(path, "--report", str(report_file))
            assert len(report_file.read_text(encoding="utf-8").splitlines()) == num_lines

    def test_a_report_never_overwrites_the_data(self, image_folder, tmp_path, capsys):
        """However its path is written, and even if it looks like a report."""
        path = tmp_path / "data.jsonl"
        path.write_text('{"id": "1", "problem": "none", "message": "none"}\n')
        (tmp_path / "symbolic.jsonl").symlink_to(path)
        (tmp_path / "hard.jsonl").hardlink_to(path)
        for report in (
            path,
            tmp_path / "images" / ".." / path.name,
            tmp_path / "symbolic.jsonl",
            tmp_path / "hard.jsonl",
        ):
            assert run(path, "--report", str(report)) == 1
            assert "is not a report, but the data" in capsys.readouterr().err
            assert path.read_text().startswith('{"id": "1"')

    def test_data_that_looks_like_a_report_is_not_overwritten(self, image_folder, tmp_path):
        other = tmp_path / "other.jsonl"
        other.write_text('{"id": "1", "problem": "", "message": "", "conversations": []}\n')
        assert run(write(image_folder, [llava("Hi")]), "--report", str(other)) == 1
        assert "conversations" in other.read_text()

    def test_max_image_side(self, image_folder, capsys):
        path = write(image_folder, [llava(image="a.png")])
        assert run(path, "--max-image-side", "8") == 0
        assert run(path, "--max-image-side", "7") == 1
        assert "8 x 6 pixels, more than `max_image_side: 7`" in capsys.readouterr().out

    def test_show(self, image_folder, capsys):
        path = write(image_folder, [llava(image="lost.png", id=f"s{i}") for i in range(9)])
        assert run(path, "--show", "2") == 1
        out = capsys.readouterr().out
        assert [f"Sample 's{i}'" in out for i in range(4)] == [True, True, False, False]
        assert "  … and 7 more\n" in out

    def test_image_folder_and_split(self, image_folder, tmp_path, capsys):
        samples = [chat("What?", images=["a.png"])]
        datasets.DatasetDict({"val": datasets.Dataset.from_list(samples)}).save_to_disk(tmp_path / "saved")
        assert run(tmp_path / "saved", "--split", "val", "--image-folder", str(image_folder)) == 0
        assert run(tmp_path / "saved", "--split", "val") == 1
        assert run(tmp_path / "saved") == 1
        assert "florence-vl: error: " in capsys.readouterr().err

    @pytest.mark.parametrize("content", ["", "[]", '{"id": 1}', '[{"id": 1}, {'])
    def test_no_conversations_is_one_line(self, image_folder, capsys, content):
        (image_folder / "samples.json").write_text(content)
        assert run(image_folder / "samples.json") == 1
        errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert len(errors) == 1
        assert "samples.json" in errors[0]

    def test_a_template_requires_a_model(self, image_folder, capsys):
        assert run(write(image_folder, [llava("Hi")]), "--chat-template", "plain") == 2
        assert "--model" in capsys.readouterr().err

    def test_lengths(self, image_folder, converted, capsys):
        samples = [llava("Hi", "word " * n, id=f"s{n}") for n in (1, 10, 1000)]
        assert run(write(image_folder, samples), "--model", str(converted), "--max-length", "500") == 0
        out = capsys.readouterr().out
        assert "longer than max_length: 1 (training truncates them)\n  Sample 's1000': It has " in out
        tokens = next(line for line in out.splitlines() if line.startswith("Tokens per sample: "))
        assert re.search(r"mean [\d,]+, shortest \d+, .*, longest 1,\d+; max_length is 500\.$", tokens)


class TestLengths:
    SAMPLES = (
        llava("<image>\nWhat is this?", "A red square.", image="a.png"),
        llava("What <image> is\n<image>?", "Squares.", image=["a.png", "a.png"]),
        llava("Hello", "Good day."),
        {
            "conversations": [{"from": "system", "value": "Brief."}] + llava()["conversations"] * 3,
            "image": ["a.png"] * 3,
        },
        llava("<image>", "Ünïcode 😀 text", image="a.png"),
    )

    @pytest.mark.parametrize("template", [None, "plain"])
    def test_as_the_processor_counts(self, image_folder, processor, template):
        """`check_data` uses blank images without pixel values, the processor the images themselves."""
        dataset = load_conversations(write(image_folder, list(self.SAMPLES)))
        report = check_data(dataset, processor, chat_template=template, num_workers=0)
        expected = []
        for sample in dataset:
            options = {"tokenize": True, "return_dict": True, "chat_template": template}
            expected.append(len(processor.apply_chat_template(to_messages(sample), **options)["input_ids"][0]))
        assert sorted(report.lengths.elements()) == sorted(expected)
        assert report.is_sound

    def test_the_processor_is_not_changed(self, image_folder, processor):
        image_processor = processor.image_processor
        check(write(image_folder, [llava(image="a.png")]), processor)
        assert processor.image_processor is image_processor

    def test_limits(self, image_folder, processor):
        """A sample is valid at each limit, and not one token below."""

        def problems(sample: dict[str, Any], max_length: int) -> set[Problem]:
            return set(check(path, processor, max_length=max_length).problems)

        sample = llava("<image>\nWhat is this?", "A red square.", image="a.png")
        path = write(image_folder, [sample])
        encoded = processor.apply_chat_template(
            to_messages(load_conversations(path)[0]),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids, is_answer = encoded["input_ids"][0], encoded["assistant_masks"][0]
        total, answer = len(ids), is_answer.index(1)
        images = total - ids[::-1].index(processor.image_token_id)
        assert problems(sample, total) == set()
        assert problems(sample, total - 1) == {Problem.TOO_LONG}
        assert problems(sample, answer + 1) == {Problem.TOO_LONG}
        assert problems(sample, answer) == {Problem.NOTHING_TO_LEARN}
        assert problems(sample, images) == {Problem.NOTHING_TO_LEARN}
        assert problems(sample, images - 1) == {Problem.IMAGES_TOO_LONG}

    def test_a_template_without_generation_blocks(self, image_folder, processor):
        template = "{% for m in messages %}{{ m.role }}{% endfor %}"
        report = check(write(image_folder, [llava("Hi")]), processor, chat_template=template)
        assert "{% generation %}" in report.examples[Problem.NOTHING_TO_LEARN][0]

    def test_samples_that_are_only_too_long_do_not_fail(self, image_folder, processor):
        report = check(write(image_folder, [llava("Hi", "word " * 999)]), processor, max_length=500)
        assert report.problems == {Problem.TOO_LONG: 1}
        assert report.is_sound


class TestWorkers:
    def test_same_report(self, image_folder, processor):
        samples = [llava(f"<image> {i}", image="lost.png" if i % 7 == 3 else "a.png", id=f"s{i}") for i in range(70)]
        path = write(image_folder, samples)
        alone, together = (check(path, processor, num_workers=num_workers) for num_workers in (0, 2))
        assert alone == together
        assert alone.problems == {Problem.MISSING_IMAGE: 10}


class TestReport:
    def test_quantiles(self):
        report = DataReport(max_length=2048)
        for length, count in {3: 1, 40: 80, 70: 0, 100: 38, 3000: 2}.items():
            for _ in range(count):
                report.add(SampleCheck("s", num_turns=1, num_tokens=length))
        quantiles = "shortest 3, 10 % 40, median 40, 90 % 100, 99 % 3,000, longest 3,000"
        assert f"Tokens per sample: mean 107, {quantiles}; max_length is 2,048." in format_report(report).splitlines()

    def test_a_sample_with_two_problems_counts_once(self):
        report = DataReport(max_length=1, num_examples=1)
        errors = [SampleError("first", Problem.MISSING_IMAGE), SampleError("second", Problem.MISSING_IMAGE)]
        report.add(SampleCheck("s", num_turns=1, problems=errors))
        assert (report.num_broken, report.problems[Problem.MISSING_IMAGE]) == (1, 2)
        assert report.examples == {Problem.MISSING_IMAGE: ["Sample 's': first"]}


class TestTrainingSkipsTheSame:
    def test_samples_of_all_kinds(self, image_folder, processor):
        Image.new("1", (20_000, 1)).save(image_folder / "line.png")
        Image.new("1", (1, 20_000)).save(image_folder / "column.png")
        (image_folder / "broken.png").write_bytes((image_folder / "a.png").read_bytes()[:50])
        os.mkfifo(image_folder / "pipe.png")
        nested = "[" * 2000 + "]" * 2000
        broken = [
            *(llava(image=name) for name in ("line.png", "column.png", "broken.png", "pipe.png", "deep", "a\0.png")),
            llava("<im<image>age>", image="a.png"),
            llava("<image>" * 100, image=["a.png"] * 100),
            llava("<image>" + "word " * 100_000, image="a.png"),
            llava("word " * 100_000 + "<image>", image="a.png"),
            llava("Hi", " "),
            llava("Hi", None),
            llava("Hi", float("nan")),
            {"conversations": []},
            {"conversations": nested},
            10**30,
        ]
        valid = [
            llava(image="a.png", id=10**30, boxes=[float("nan"), 1e999]),
            llava("Hi", "word " * 100_000),
            llava("Hi\ud800\0", "\udfff\0 there"),
        ]
        lines = [json.dumps(sample) for sample in (*broken, *valid)]
        lines += [f'{{"id": {"9" * 5000}, "conversations": 1}}', f'{{"conversations": {nested}}}']
        path = image_folder / "samples.json"
        path.write_text("[" + ", ".join(lines) + "]")
        dataset = load_conversations(path)
        report = check_data(dataset, processor, max_length=500, num_workers=0)
        assert (report.num_samples, report.num_broken) == (len(lines), len(broken) + 2)
        assert report.problems[Problem.TOO_LONG] == 1
        collate = FlorenceVLCollator(processor, max_length=500)
        collate(list(dataset))
        assert collate.num_skipped == report.num_broken
        # Of the file's lines, too.
        (image_folder / "samples.jsonl").write_text("\n".join(lines))
        of_lines = check_data(load_conversations(image_folder / "samples.jsonl"), processor, max_length=500)
        assert of_lines.problems == report.problems
