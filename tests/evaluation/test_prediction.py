# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image

from florence_vl_hf.conversion import load_pretrained
from florence_vl_hf.evaluation import load_questions, predict
from florence_vl_hf.serving import ChatSession

from ..conftest import llava_sample
from .conftest import LLAMA, write


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


@pytest.fixture(scope="module")
def answers(directory, tmp_path_factory):
    """Answers to questions of different lengths, one by one and in batches."""
    folder = tmp_path_factory.mktemp("answers")
    images = LLAMA.reference["images"]
    samples = [llava_sample(10 ** (i % 4), images[i % 5 : i % 5 + (1, 0, 2)[i % 3]]) for i in range(12)]
    questions = load_questions(write(folder, samples))
    options = {"max_new_tokens": 12, "device": "cpu", "dtype": torch.float32}
    return [predict(questions, directory, folder / f"{n}.jsonl", batch_size=n, **options) for n in (1, 5)]


class TestAnswers:
    def test_batches_have_the_answers_of_single_samples(self, answers):
        single, batched = answers
        assert single == batched
        assert len({len(record["answer"]) for record in single}) > 3

    def test_answers_are_those_of_a_chat(self, answers, directory):
        model, processor = load_pretrained(directory, dtype=torch.float32)
        model.generation_config.update(max_new_tokens=12, do_sample=False, temperature=None)
        for record in answers[1]:
            assert record["answer"] == ChatSession(model, processor, record["images"]).answer(
                "\n" * (len(record["images"]) - 1) + "\n" * bool(record["images"]) + record["question"]
            ), record

    def test_too_long(self, directory, tmp_path):
        samples = [llava_sample(0, []), {"messages": [{"role": "user", "content": "word " * 20_000}]}]
        answer, error = predict(
            load_questions(write(tmp_path, samples)), directory, tmp_path / "a.jsonl", device="cpu"
        )
        assert "answer" in answer and "tokens, the model supports" in error["error"]


class TestQuestions:
    """With a server that answers with the question."""

    def test_order_broken_samples_and_references(self, file, server, tmp_path):
        answers = predict(load_questions(file), "served", tmp_path / "new" / "a.jsonl", server=server.url)
        assert [r["id"] for r in answers] == [
            "sample-0",
            "sample-90",
            "malformed",
            *(f"sample-{i}" for i in range(1, 10)),
        ]
        assert "There is no image" in answers[1]["error"] and "conversations" in answers[2]["error"]
        for number, record in enumerate(answers[:1] + answers[3:]):
            sizes = [Image.open(image).size for image in record["images"]]
            last = number + number % 2  # of two turns, the second
            assert record["answer"] == f"What is {last}? {sizes}" and record["question"] == f"What is {last}?"
            assert record["references"] == [f"It is {last}."]
        assert lines_of(tmp_path / "new" / "a.jsonl") == answers

    def test_the_last_answer_is_hidden(self, server, tmp_path):
        samples = [llava_sample(0, ["odd.jpg"], turns=3)]
        predict(load_questions(write(tmp_path, samples)), "served", tmp_path / "a.jsonl", server=server.url)
        [request] = server.requests
        assert [message["role"] for message in request["messages"]] == ["user", "assistant"] * 2 + ["user"]
        assert (
            request["temperature"] == 0 and "It is 2" not in json.dumps(request) and "It is 1" in json.dumps(request)
        )

    def test_references(self, tmp_path, server):
        turns = [{"role": "user", "content": "Why?"}]
        both = {**llava_sample(1, []), "answers": ["one", "1"]}
        samples = [{"messages": turns}, {"messages": turns, "answers": ["yes", "no"]}, both, {**both, "answers": 7}]
        answers = predict(load_questions(write(tmp_path, samples)), "served", tmp_path / "a.jsonl", server=server.url)
        assert [record["references"] for record in answers] == [[], ["yes", "no"], ["one", "1"], []]
        assert "expected a list of strings" in answers[3]["error"]

    def test_directory_of_images(self, file, server, tmp_path):
        (tmp_path / "deep").mkdir()
        Image.new("RGB", (3, 2)).save(tmp_path / "deep" / "new.png")
        questions = load_questions(tmp_path, question="What is it?")
        answers = predict(questions, "served", tmp_path / "a.jsonl", server=server.url)
        assert [r["id"] for r in answers] == sorted([*LLAMA.reference["images"], "deep/new.png"])
        assert {r["id"]: r["answer"] for r in answers}["deep/new.png"] == "What is it? [(3, 2)]"

    def test_images_of_a_dataset(self, server, tmp_path):
        images = [[Image.new("RGB", (4 + i, 5))] for i in range(3)]
        messages = [[{"role": "user", "content": f"What is {i}?"}] for i in range(3)]
        saved = datasets.Dataset.from_dict({"messages": messages, "images": images, "answers": [["a", "b"]] * 3})
        saved.save_to_disk(tmp_path / "data")
        questions = load_questions(tmp_path / "data")
        answers = predict(questions, "served", tmp_path / "a.jsonl", server=server.url)
        assert [r["answer"] for r in answers] == [f"What is {i}? [({4 + i}, 5)]" for i in range(3)]
        assert answers[0]["references"] == ["a", "b"]


class TestServer:
    def test_requests_at_the_same_time(self, file, server, tmp_path):
        server.delay = 0.3
        predict(load_questions(file), "served", tmp_path / "a.jsonl", server=server.url, batch_size=4)
        assert server.max_open == 4

    def test_refused_sample(self, server, tmp_path):
        samples = [llava_sample(0, []), {"messages": [{"role": "user", "content": "too long"}]}]
        answers = predict(load_questions(write(tmp_path, samples)), "served", tmp_path / "a.jsonl", server=server.url)
        assert "answer" in answers[0] and "The server refuses it" in answers[1]["error"]

    def test_other_failures_end_the_run(self, file, server, tmp_path, monkeypatch):
        monkeypatch.setattr("florence_vl_hf.evaluation.server.MAX_RETRIES", 0)
        with pytest.raises(ConnectionError, match="does not answer for the model 'other'"):
            predict(load_questions(file), "other", tmp_path / "a.jsonl", server=server.url)
        with pytest.raises(ConnectionError, match="http://127.0.0.1:9/v1 does not answer"):
            predict(load_questions(file), "served", tmp_path / "a.jsonl", server="http://127.0.0.1:9/v1")
        assert len(predict(load_questions(file), "served", tmp_path / "a.jsonl", server=server.url)) == 12


class TestResuming:
    @pytest.mark.slow
    def test_a_killed_run(self, file, server, tmp_path):
        output, server.limit = tmp_path / "a.jsonl", 4
        command = ["predict", file, "served", "--server", server.url, "--output", output, "--batch-size", "1"]
        process = subprocess.Popen([sys.executable, "-m", "florence_vl_hf", *map(str, command)])
        partial, deadline = tmp_path / "a.jsonl.partial", time.monotonic() + 120
        while len(server.requests) < 5:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not output.exists() and len(lines_of(partial)) >= 4
        with open(partial, "ab") as partial_file:
            partial_file.write('{"index": 0, "answer": "é'.encode()[:-1])
        first, server.requests, server.limit = server.requests[:4], [], 100
        answers = predict(load_questions(file), "served", output, server=server.url)
        assert answers == predict(load_questions(file), "served", tmp_path / "b.jsonl", server=server.url)
        asked = [request["messages"] for request in server.requests[:6]]
        assert len(server.requests) == 6 + 10 and not [r for r in first if r["messages"] in asked]
        assert sorted(path.name for path in tmp_path.glob("*a.jsonl*")) == ["a.jsonl", "a.jsonl.settings.json"]

    def test_errors_are_tried_again(self, file, server, tmp_path):
        output, lines = tmp_path / "a.jsonl", [{"index": 1, "error": "lost"}, {"index": 0, "answer": "kept"}]
        predict(load_questions(file), "served", output, server=server.url)
        output.unlink()
        output.with_name("a.jsonl.partial-1").write_text("".join(json.dumps(line) + "\n" for line in lines))
        answers = predict(load_questions(file), "served", output, server=server.url)
        assert answers[0]["answer"] == "kept" and "There is no image" in answers[1]["error"]

    def test_complete_answers_are_read(self, file, server, tmp_path):
        first = predict(load_questions(file), "served", tmp_path / "a.jsonl", server=server.url)
        server.requests.clear()
        assert predict(load_questions(file), "served", tmp_path / "a.jsonl", server=server.url) == first
        assert server.requests == []

    @pytest.mark.parametrize("is_complete", [True, False])
    def test_other_settings_are_refused(self, is_complete, file, server, tmp_path):
        output = tmp_path / "a.jsonl"
        predict(load_questions(file), "served", output, server=server.url)
        if not is_complete:
            output.unlink()
            output.with_name("a.jsonl.partial").write_text('{"index": 0, "answer": "kept"}\n')
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        questions = load_questions(file)
        with pytest.raises(ValueError, match="max_new_tokens 512, now 7"):
            predict(questions, "served", output, server=server.url, max_new_tokens=7)
        with pytest.raises(ValueError, match="model served, now other"):
            predict(questions, "other", output, server=server.url)
        with pytest.raises(ValueError, match="other settings .samples "):
            predict(load_questions(write(tmp_path, [llava_sample(3, [])] * 12)), "served", output, server=server.url)
        assert before == {path: before.get(path) and path.read_bytes() for path in tmp_path.iterdir()} | {
            file: before[file]
        }

    def test_a_foreign_file_is_kept(self, file, server, tmp_path):
        (tmp_path / "a.jsonl").write_text("mine")
        with pytest.raises(ValueError, match="a.jsonl is not from this command"):
            predict(load_questions(file), "served", tmp_path / "a.jsonl", server=server.url)
        assert (tmp_path / "a.jsonl").read_text() == "mine"


@pytest.mark.slow
def test_two_processes_have_the_answers_of_one(file, directory, tmp_path):
    options = ["--max-new-tokens", "6", "--batch-size", "2", "--device", "cpu"]
    launch = "accelerate.commands.launch --multi_gpu --main_process_port=0 --num_processes=2 --mixed_precision=no"
    command = [sys.executable, "-m", *launch.split(), "-m", "florence_vl_hf", "predict", str(file), str(directory)]
    command += ["--output", str(tmp_path / "two.jsonl"), *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TORCH_GLOO_LAZY_INIT": "0"}
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=150)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Wrote") == 1 and "6/6" in result.stderr
    one = predict(load_questions(file), directory, tmp_path / "one.jsonl", max_new_tokens=6, device="cpu")
    assert lines_of(tmp_path / "two.jsonl") == one
