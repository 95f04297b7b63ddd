# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `lmms-eval --model florence_vl`, on local images and questions."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import load_yaml_config
from torch.testing import assert_close

from florence_vl_hf.conversion import load_pretrained
from florence_vl_hf.evaluation.lmms_eval_model import generation_settings, stop_strings
from florence_vl_hf.model_cards.published import PUBLISHED_RESULTS
from florence_vl_hf.serving import DECODING

from ..conftest import Golden


# Of different lengths, with zero to two images; `<image>` is not one more image.
QUESTIONS = [
    {"images": ["odd.jpg"], "question": "What is it?", "answer": "red", "choices": ["red", "blue and green"]},
    {"images": [], "question": "What is 7 and 8? Think of it.", "answer": "15", "choices": ["78", "15", "1"]},
    {"images": ["wide.png", "alpha.png"], "question": "<image> Same?", "answer": "No.", "choices": ["Yes.", "No."]},
    {"images": ["palette.png"], "question": "Describe the image in detail.", "answer": "b", "choices": ["a", "b"]},
    {"images": ["gray.png"], "question": "Why?", "answer": "It is a square.", "choices": ["It is a square.", "No"]},
]


@pytest.fixture
def run_folder(golden: Golden, tmp_path: Path) -> Path:
    """A directory with the data of the tasks."""
    rows = [q | {"images": [str(golden.image_path(name)) for name in q["images"]]} for q in QUESTIONS]
    data = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    data.to_parquet(tmp_path / "questions.parquet")
    return tmp_path


def lmms_eval(
    folder: Path, tasks: str, model_args: dict[str, Any], *options: str, processes: int = 1
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Run the command, and return scores and samples by task."""
    arguments = ",".join(f"{name}={value}" for name, value in (model_args | {"dtype": "float32"}).items())
    output = folder / "output"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] * (processes > 1)
    command = [sys.executable, *launch, "-m", "lmms_eval", "--model", "florence_vl", "--model_args", arguments]
    command += ["--tasks", tasks, "--include_path", str(Path(__file__).parent / "tasks")]
    command += ["--output_path", str(output), "--log_samples"]
    # Without this verbosity, a failed evaluation exits with 0.
    command += ["--verbosity", "DEBUG", *options]
    environment = os.environ | {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert all(f"Running on rank {rank} " in result.stdout + result.stderr for rank in range(processes))
    [scores] = output.glob("*/*_results.json")
    samples = {}
    for task in tasks.split(","):
        [path] = output.glob(f"*/*_samples_{task}.jsonl")
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        samples[task] = sorted(lines, key=lambda line: line["doc_id"])
        assert len(lines) == len(QUESTIONS)
    return json.loads(scores.read_text(encoding="utf-8"))["results"], samples


def answers(samples: list[dict[str, Any]]) -> list[str]:
    return [sample["filtered_resps"] for sample in samples]


def encode(golden: Golden, processor: Any, question: dict[str, Any], *turns: dict[str, Any], **kwargs: Any) -> Any:
    content = [{"type": "image", "path": str(golden.image_path(name))} for name in question["images"]]
    text = {"type": "text", "text": question["question"].replace("<image>", "")}
    messages = [{"role": "user", "content": [*content, text]}, *turns]
    return processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", **kwargs)


@pytest.fixture(scope="module")
def loaded(converted: Path) -> tuple[Any, Any]:
    return load_pretrained(converted, dtype=torch.float32)


def generated(golden: Golden, loaded: tuple[Any, Any], max_new_tokens: int) -> list[str]:
    """Greedy answers of the model, one by one. lmms-eval strips them, too."""
    model, processor = loaded
    texts = []
    for question in QUESTIONS:
        inputs = encode(golden, processor, question, add_generation_prompt=True)
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        texts.append(processor.decode(ids[0, inputs["input_ids"].shape[1] :], **DECODING).strip())
    return texts


def test_batched_answers_are_those_of_generate(golden, converted, loaded, run_folder):
    model_args = {"pretrained": converted, "attn_implementation": "eager", "device": "cpu"}
    scores, samples = lmms_eval(run_folder, "paragraphs,questions", model_args, "--batch_size", "3")
    expected = generated(golden, loaded, 16)
    assert len(set(expected)) > 1
    assert answers(samples["paragraphs"]) == expected
    whole = generated(golden, loaded, 12)
    stopped = [text.partition("e")[0].strip() for text in whole]
    assert answers(samples["questions"]) == stopped != whole
    assert scores["paragraphs"]["exact_match,none"] == 0


def test_original_checkpoint_one_by_one_in_two_processes(golden, loaded, run_folder):
    model_args = {"pretrained": golden.checkpoint, "batch_size": 1}
    if golden.vision_tower is not None:
        model_args["vision_tower"] = golden.vision_tower
    _, samples = lmms_eval(run_folder, "paragraphs", model_args, processes=2)
    assert answers(samples["paragraphs"]) == generated(golden, loaded, 16)


def test_simple_interface_scores_choices(golden, converted, loaded, run_folder):
    model_args = {"pretrained": converted, "batch_size": 3}
    scores, samples = lmms_eval(run_folder, "choices,paragraphs", model_args, "--force_simple")
    assert answers(samples["paragraphs"]) == generated(golden, loaded, 16)

    model, processor = loaded
    correct = 0
    for question, sample in zip(QUESTIONS, samples["choices"], strict=True):
        losses = []
        for choice in question["choices"]:
            turn = {"role": "assistant", "content": choice}
            inputs = encode(golden, processor, question, turn, return_assistant_tokens_mask=True)
            is_answer = torch.as_tensor(inputs.pop("assistant_masks")).bool()
            labels = inputs["input_ids"].masked_fill(~is_answer, -100)
            losses.append(model(**inputs, labels=labels).loss.item())
        assert_close([float(loss) for loss, _ in sample["filtered_resps"]], losses, rtol=1e-4, atol=1e-5)
        correct += question["choices"].index(question["answer"]) == losses.index(min(losses))
    assert 0 < correct < len(QUESTIONS)
    assert scores["choices"]["acc,none"] == pytest.approx(correct / len(QUESTIONS))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"do_sample": False}),
        ({"temperature": 0.0, "do_sample": True, "top_p": 0.9}, {"do_sample": False}),
        ({"temperature": 0.2, "do_sample": False}, {"do_sample": False}),
        ({"temperature": 0.2, "top_p": 0, "num_beams": None}, {"do_sample": True, "temperature": 0.2}),
        ({"do_sample": True, "max_new_tokens": 5}, {"do_sample": True, "max_new_tokens": 5}),
        ({"until": ["\n"], "image_aspect_ratio": "pad", "num_beams": 2}, {"do_sample": False, "num_beams": 2}),
    ],
)
def test_generation_settings(given, expected):
    assert generation_settings(given) == {"max_new_tokens": 1024} | expected


@pytest.mark.parametrize(
    ("until", "expected"), [(None, []), ("Q:", ["Q:"]), (["\n\n"], []), (["", "\n", "</s>"], ["\n", "</s>"])]
)
def test_stop_strings(until, expected):
    assert stop_strings({"until": until}) == expected


def test_documented_benchmarks():
    """The tasks of the command exist, with the metrics of the table, which has the paper's numbers."""
    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    [tasks] = re.findall(r"--tasks ([\w,]+)", text.replace("\\\n", ""))
    rows = re.findall(r"^\| (\S+) \| `(\w+)` \| `(\w+)` \| ([\d.]+) \| ([\d.]+) \|", text, flags=re.MULTILINE)
    assert {name: (float(large), float(small)) for name, _, _, small, large in rows} == PUBLISHED_RESULTS
    assert list(dict.fromkeys(task for _, task, *_ in rows)) == tasks.split(",")
    index = TaskManager().task_index
    for _, task, metric, *_ in rows:
        config = load_yaml_config(index[task]["yaml_path"])
        if isinstance(config["task"], list):  # a group
            config = load_yaml_config(index[config["task"][0]]["yaml_path"])
        assert metric in {entry["metric"] for entry in config["metric_list"]}
