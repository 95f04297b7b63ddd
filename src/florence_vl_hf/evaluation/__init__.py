# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Evaluation: answers to a file of samples, their scores, and a report."""

from importlib.util import find_spec


if find_spec("datasets") is None or find_spec("openai") is None or find_spec("rapidfuzz") is None:
    raise ModuleNotFoundError("Evaluation requires other packages; run `pip install 'florence_vl_hf[evaluation]'`.")

from .evaluate import evaluate, format_scores
from .metrics import METRICS, score
from .prediction import predict
from .questions import load_questions
from .report import write_report


__all__ = ["METRICS", "evaluate", "format_scores", "load_questions", "predict", "score", "write_report"]
