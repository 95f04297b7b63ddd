# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Evaluation of a model on a file of samples: answers, scores and a report."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
from accelerate import PartialState

from ..conversion.checkpoint_files import write_file
from .metrics import score
from .prediction import describe, predict
from .report import write_report


def evaluate(
    samples: datasets.Dataset,
    model: str | Path,
    output: str | Path,
    metrics: Iterable[str] = ("exact_match",),
    **kwargs: Any,
) -> dict[str, Any]:
    """
    Answer all samples, score the answers, and write `answers.jsonl`, `scores.json` and `report.html`.

    Answers that are there already, with the same settings, are scored again.

    Args:
        samples (`datasets.Dataset`): Samples of `load_questions`.
        model (`str` or `Path`): As in `predict`.
        output (`str` or `Path`): The output directory.
        metrics (iterable of `str`, *optional*): As in `score`.
        kwargs: Other arguments of `predict`.

    Returns:
        `dict`: What `score` returns.

    Raises:
        ValueError: As in `predict` and `score`. If a metric does not suit the samples, before any is answered.
    """
    output, metrics = Path(output), list(metrics)
    check_metrics(samples, metrics)
    answers = predict(samples, model, output / "answers.jsonl", **kwargs)
    scores = score(answers, metrics)
    if PartialState().is_main_process:
        write_file(output / "scores.json", json.dumps(scores, indent=2, ensure_ascii=False))
        write_report(output / "report.html", samples, answers, scores, f"Answers of {model}")
    return scores


def check_metrics(samples: datasets.Dataset, metrics: Iterable[str]) -> None:
    """Raise a `ValueError` if a metric does not exist, or does not suit the samples of `load_questions`."""
    known = [
        describe(sample) | ({"error": sample["problem_message"]} if sample["problem"] else {"answer": ""})
        for sample in samples
    ]
    score(known, metrics)


def format_scores(scores: dict[str, Any]) -> str:
    """Format scores as a table for a terminal, in percent."""
    lines = [f"{'metric':<18}{'score':>7}   95 % interval"]
    for name, result in scores["metrics"].items():
        low, high = result["confidence_interval"]
        lines.append(f"{name:<18}{100 * result['score']:>7.1f}   {100 * low:.1f} to {100 * high:.1f}")
    counts = f"{scores['num_scored']:,} scored, {scores['num_errors']:,} with an error"
    return "\n".join([*lines, f"{scores['num_samples']:,} samples: {counts}."])


__all__ = ["check_metrics", "evaluate", "format_scores"]
