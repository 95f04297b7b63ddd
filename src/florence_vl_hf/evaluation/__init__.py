# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Evaluation: answers to a file of samples, their scores, and a report."""

from importlib.util import find_spec


for _name in ("datasets", "openai", "rapidfuzz"):
    if find_spec(_name) is None:
        raise ModuleNotFoundError(f"Evaluation requires {_name}; run `pip install 'florence_vl_hf[evaluation]'`.")

from .evaluate import evaluate, format_scores
from .metrics import METRICS, score
from .prediction import predict
from .questions import load_questions
from .report import write_report


__all__ = ["METRICS", "evaluate", "format_scores", "load_questions", "predict", "score", "write_report"]
