# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import json
import re

import pytest

from ..conftest import llava_sample, status
from ..evaluation.conftest import directory, file, server, write


__all__ = ["directory", "file", "server"]


class TestPredict:
    def test_writes_answers(self, directory, file, tmp_path, capfd):
        output = tmp_path / "a.jsonl"
        options = ["--device", "cpu", "--dtype", "float32", "--max-new-tokens", "3"]
        assert status("predict", file, directory, "--output", output, *options) == 0
        assert f"Wrote {output}: 10 answers, 2 samples with an error.\n" in capfd.readouterr().out
        assert len(output.read_text(encoding="utf-8").splitlines()) == 12

    def test_one_question_about_images(self, file, server, tmp_path):
        options = ["--question", "What?", "--server", server.url, "--output", tmp_path / "a.jsonl"]
        assert status("predict", tmp_path, "served", *options) == 0
        assert {request["max_tokens"] for request in server.requests} == {512} and len(server.requests) == 7

    @pytest.mark.parametrize(
        ("name", "model", "options", "message"),
        [
            ("samples.jsonl", "nowhere", [], "nowhere is neither"),
            ("nowhere.jsonl", "model", [], "There is no file"),
            ("samples.jsonl", "model", ["--question", "What?"], "is not a directory"),
            ("empty", "model", ["--question", "What?"], "has no images"),
            (
                "samples.jsonl",
                "served",
                ["--image-folder", "nowhere"],
                "No sample of .* can be answered. Of the first:",
            ),
        ],
    )
    def test_errors_are_one_line(self, name, model, options, message, server, tmp_path, capfd):
        write(tmp_path, [llava_sample(0, ["odd.jpg"])])
        (tmp_path / "empty").mkdir()
        options = [*options, *(["--server", server.url] if model == "served" else [])]
        assert status("predict", tmp_path / name, model, "--output", tmp_path / "a.jsonl", *options) == 1
        [error] = [line for line in capfd.readouterr().err.split("\n") if line.startswith("florence-vl: ")]
        assert re.search(message, error)


class TestEval:
    def test_writes_answers_scores_and_report(self, file, server, tmp_path, capfd):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        lines[0]["answers"] = [f"What is 0? {[(90, 60)]}"] * 4
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        options = ["--server", server.url, "--output", tmp_path / "out"]
        assert status("eval", file, "served", *options, "--metric", "exact_match,anls") == 0
        printed, written = capfd.readouterr().out, json.loads((tmp_path / "out" / "scores.json").read_text())
        assert (
            written["num_scored"] == 10
            and written["num_errors"] == 2
            and list(written["metrics"]) == ["exact_match", "anls"]
        )
        for name, result in written["metrics"].items():
            assert re.search(rf"{name} +{100 * result['score']:.1f} ", printed)
        assert len((tmp_path / "out" / "answers.jsonl").read_text(encoding="utf-8").splitlines()) == 12
        assert (tmp_path / "out" / "report.html").read_text(encoding="utf-8").count("<article") == 12
        # Another metric needs no other answers.
        server.requests.clear()
        assert status("eval", file, "served", *options, "--metric", "relaxed_accuracy") == 0
        assert server.requests == [] and "relaxed_accuracy" in (tmp_path / "out" / "scores.json").read_text()

    @pytest.mark.parametrize(("metric", "message"), [("vqa_accuracy", "requires several"), ("bleu", "no metric bleu")])
    def test_a_wrong_metric_costs_no_answers(self, metric, message, file, server, tmp_path, capfd):
        options = ["--server", server.url, "--output", tmp_path / "out", "--metric", metric]
        assert status("eval", file, "served", *options) == 1
        assert message in capfd.readouterr().err and server.requests == [] and not (tmp_path / "out").exists()
