# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from florence_vl_hf.processing import FlorenceVLProcessor
from florence_vl_hf.training.check_data import DataReport, SampleCheck, check_data, format_report
from florence_vl_hf.training.conversation_data import Problem, SampleError, load_conversations, to_messages

from ..conftest import status
from .conversations import chat, llava, write


def run(path: Path, *options: str) -> int:
    """The command's exit status."""
    return status("check-data", path, "--workers", "0", *options)


def check(path: Path, processor: FlorenceVLProcessor | None = None, **options: Any) -> DataReport:
    return check_data(load_conversations(path), processor, **{"num_workers": 0, **options})


class TestCommand:
    def test_sound(self, picture_folder, capsys):
        rows = [
            llava(image="a.png", id=0),
            llava("Hi", "Ho"),
            llava("<image><image>", image=["a.png", "deep/ü b.jpg"]),
        ]
        rows[1]["conversations"] *= 3
        assert run(write(picture_folder, rows)) == 0
        out = capsys.readouterr().out
        assert out.startswith(
            "3 samples: 2 with pictures (3 pictures), 1 without; 1.7 rounds on average, 3 at most.\n"
        )
        assert "named by --model" in out
        assert out.endswith("All 3 samples are sound.\n")

    def test_every_problem_is_named(self, picture_folder, tmp_path, capsys):
        (picture_folder / "torn.png").write_bytes((picture_folder / "a.png").read_bytes()[:50])
        rows = [
            llava(image="a.png"),
            {"id": 8, "conversations": "Hi"},
            llava(image="../../secret.png", id="evil"),
            llava(image="lost.png", id="größe"),
            llava("<image><image>", image=["torn.png", "lost.png"], id="torn"),
            llava(id="no picture"),
            {"id": "turned", "conversations": llava()["conversations"][::-1]},
            llava("Hi", " \n", id="empty"),
        ]
        report_file = tmp_path / "report.jsonl"
        assert run(write(picture_folder, rows, "rows.jsonl"), "--report", str(report_file)) == 1
        out = capsys.readouterr().out
        lines = [json.loads(line) for line in report_file.read_text(encoding="utf-8").splitlines()]
        found = [(line["id"], line["problem"]) for line in lines]
        assert found == [
            ("8", Problem.FORM),
            ("evil", Problem.OUTSIDE),
            ("größe", Problem.MISSING),
            ("torn", Problem.BROKEN),
            ("torn", Problem.MISSING),
            ("no picture", Problem.MARKS),
            ("turned", Problem.ROLES),
            ("empty", Problem.NOTHING_TO_LEARN),
        ]
        assert all(f"  {line['message']}\n" in out for line in lines)
        assert all(f"Sample {line['id']!r}: " in line["message"] for line in lines)
        assert "missing picture: 2\n" in out
        assert "8 samples: 3 with pictures (4 pictures), 1 without, 4 unreadable;" in out
        assert out.endswith("7 of 8 samples have problems.\n")

    def test_show(self, picture_folder, capsys):
        path = write(picture_folder, [llava(image="lost.png", id=f"s{i}") for i in range(9)])
        assert run(path, "--show", "2") == 1
        out = capsys.readouterr().out
        assert [f"Sample 's{i}'" in out for i in range(4)] == [True, True, False, False]
        assert "  … and 7 more\n" in out

    def test_image_folder_and_split(self, picture_folder, tmp_path, capsys):
        rows = [chat("What?", images=["a.png"])]
        datasets.DatasetDict({"val": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "saved")
        assert run(tmp_path / "saved", "--split", "val", "--image-folder", str(picture_folder)) == 0
        assert run(tmp_path / "saved", "--split", "val") == 1
        assert run(tmp_path / "saved") == 1
        assert "florence-vl: error: " in capsys.readouterr().err

    @pytest.mark.parametrize("content", ["", "[]", '{"id": 1}', '[{"id": 1}, {'])
    def test_no_conversations_is_one_line(self, picture_folder, capsys, content):
        (picture_folder / "rows.json").write_text(content)
        assert run(picture_folder / "rows.json") == 1
        complaints = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert len(complaints) == 1
        assert "rows.json" in complaints[0]

    def test_a_template_takes_a_model(self, picture_folder, capsys):
        assert run(write(picture_folder, [llava("Hi")]), "--chat-template", "plain") == 2
        assert "--model" in capsys.readouterr().err

    def test_lengths(self, picture_folder, converted, capsys):
        rows = [llava("Hi", "word " * n, id=f"s{n}") for n in (1, 10, 1000)]
        assert run(write(picture_folder, rows), "--model", str(converted), "--max-length", "500") == 0
        out = capsys.readouterr().out
        assert "longer than max_length: 1 (training cuts them)\n  Sample 's1000': it has " in out
        assert "max_length is 500." in out
        assert "#" in out


class TestLengths:
    ROWS = (
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
    def test_as_the_processor_counts(self, picture_folder, processor, template):
        """Here with blank pictures that nothing is made of; there with pixels, and all ids."""
        dataset = load_conversations(write(picture_folder, list(self.ROWS)))
        report = check_data(dataset, processor, chat_template=template, num_workers=0)
        expected = []
        for row in dataset:
            options = {"tokenize": True, "return_dict": True, "chat_template": template}
            expected.append(len(processor.apply_chat_template(to_messages(row), **options)["input_ids"][0]))
        assert sorted(report.lengths.elements()) == sorted(expected)
        assert report.is_sound

    def test_the_processor_is_left_alone(self, picture_folder, processor):
        image_processor = processor.image_processor
        check(write(picture_folder, [llava(image="a.png")]), processor)
        assert processor.image_processor is image_processor

    def test_limits(self, picture_folder, processor):
        """Around each limit, a sample is fine at it, and not one below."""

        def problems(row: dict[str, Any], max_length: int) -> set[Problem]:
            return set(check(path, processor, max_length=max_length).problems)

        row = llava("<image>\nWhat is this?", "A red square.", image="a.png")
        path = write(picture_folder, [row])
        encoded = processor.apply_chat_template(
            to_messages(load_conversations(path)[0]),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids, is_said = encoded["input_ids"][0], encoded["assistant_masks"][0]
        total, answer = len(ids), is_said.index(1)
        pictures = total - ids[::-1].index(processor.image_token_id)
        assert problems(row, total) == set()
        assert problems(row, total - 1) == {Problem.TOO_LONG}
        assert problems(row, answer + 1) == {Problem.TOO_LONG}
        assert problems(row, answer) == {Problem.TOO_LONG, Problem.NOTHING_TO_LEARN}
        assert problems(row, pictures) == {Problem.TOO_LONG, Problem.NOTHING_TO_LEARN}
        assert problems(row, pictures - 1) == {Problem.PICTURES_TOO_LONG, Problem.NOTHING_TO_LEARN}

    def test_a_template_that_marks_no_answers(self, picture_folder, processor):
        template = "{% for m in messages %}{{ m.role }}{% endfor %}"
        report = check(write(picture_folder, [llava("Hi")]), processor, chat_template=template)
        assert "{% generation %}" in report.examples[Problem.NOTHING_TO_LEARN][0]

    def test_samples_that_are_only_too_long_do_not_fail(self, picture_folder, processor):
        report = check(write(picture_folder, [llava("Hi", "word " * 999)]), processor, max_length=500)
        assert report.problems == {Problem.TOO_LONG: 1}
        assert report.is_sound


class TestWorkers:
    def test_same_report(self, picture_folder, processor):
        rows = [llava(f"<image> {i}", image="lost.png" if i % 7 == 3 else "a.png", id=f"s{i}") for i in range(70)]
        path = write(picture_folder, rows)
        alone, together = (check(path, processor, num_workers=num_workers) for num_workers in (0, 2))
        assert alone == together
        assert alone.problems == {Problem.MISSING: 10}


class TestReport:
    def test_histogram(self):
        report = DataReport(max_length=2048)
        for length, count in {3: 1, 40: 80, 70: 0, 100: 40}.items():
            for _ in range(count):
                report.add(SampleCheck("s", num_rounds=1, num_tokens=length))
        lines = format_report(report).splitlines()
        assert "Tokens per sample: mean 60, median 40, 90 % 100, 99 % 100, longest 100; max_length is 2,048." in lines
        rows = [line.split() for line in lines if " - " in line]
        assert rows[0] == ["0", "-", "7", "1", "#"]
        assert [row for row in rows if row[3] != "0"][1:] == [
            ["40", "-", "47", "80", "#" * 40],
            ["96", "-", "103", "40", "#" * 20],
        ]
        assert len(rows) == 13

    def test_a_sample_with_two_problems_counts_once(self):
        report = DataReport(max_length=1, num_examples=1)
        errors = [SampleError("first", Problem.MISSING), SampleError("second", Problem.MISSING)]
        report.add(SampleCheck("s", num_rounds=1, problems=errors))
        assert (report.num_broken, report.problems[Problem.MISSING]) == (1, 2)
        assert report.examples == {Problem.MISSING: ["first"]}
