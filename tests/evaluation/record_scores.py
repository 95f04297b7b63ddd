# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Record `lmms_eval_scores.json`, strings with the scores that lmms-eval gives them.

Run `python -m tests.evaluation.record_scores UNPACKED_WHEEL [NUMBER]` with loguru and the unpacked wheel of lmms-eval
0.7.3, whose functions are run apart from the rest of it. With a NUMBER, that many random cases are compared instead.
"""

import ast
import json
import random
import re
import statistics
import string
import sys
from pathlib import Path
from typing import Any

import numpy as np

from florence_vl_hf.evaluation import METRICS
from florence_vl_hf.evaluation.metrics import VQA_CONTRACTIONS, VQA_NUMBERS


TABLE = Path(__file__).with_name("lmms_eval_scores.json")
NUM_CASES = 100
CHOICES = {"A": "a red cat", "B": "two dogs", "C": "Apples.", "D": "3.5 m"}
QUESTION = "What is shown?\n" + "\n".join(f"{letter}. {text}" for letter, text in CHOICES.items())
CHOICE_WORDS = [
    *("(A)", "(B)", "A.", "B", "C.", "D", "D,", "(C", "A)", "A", ":", "'", "Answer:", "two dogs", "A RED CAT"),
    *("apples.", "3.5 m", "The answer is", "I think that it", " ", "\n", "", "and", "not"),
]
# Rules that random cases rarely meet: an answer, and one reference or several.
PAIRS = [
    *[
        ("0", "none"),
        ("1000m", "1,000/m"),
        ("1 000", "1,000"),
        ("a b", "a/b"),
        ("ab", "a/ b"),
        ("somebodyd", "somebody'd"),
    ],
    *[("x", "." * 40 + "x"), ("." * 8 + "x", "." * 40 + "x"), ("dont", "don't"), ("The  cat", "cat"), ("U.S.", "us")],
    *[
        ("Straße", "Straßen"),
        ("Maße", "Maß"),
        ("STRASSE", "straße"),
        ("ab", "ac"),
        ("abc", "abd"),
        (" ab", "ab"),
        ("", ""),
        ("", " "),
    ],
    *[
        ("105", "100"),
        ("105.1", "100"),
        ("-95", "-100"),
        ("5%", "0.05"),
        ("0.0", "0"),
        ("1e2", "100"),
        ("50 %", "50%"),
    ],
]
LENGTHS = (0, 1, 1, 1, 2, 3, 8)
WORDS = [
    *VQA_NUMBERS, *VQA_CONTRACTIONS, *(word.replace("'", "", 1) for word in VQA_CONTRACTIONS),
    "none", "a", "an", "the", "The", "A", "Straße", "İstanbul", "ﬁn", "café", "somebody'd", "red", "cat", "RED",
    "dogs", "1,000", "1000", "3.5", "3.6", "-2", "5%", "0.05", "0", "1e3", "nan", "inf", "12,34", "U.S.A.",
    "...", "." * 40,
    *CHOICE_WORDS,
    *" \t\n;/[]\"{}()=+\\_-><@`,?!'.:%",
]  # fmt: skip


def load(wheel: Path, file: str, *names: str) -> dict[str, Any]:
    """Run the functions, classes and assignments of these names in a file of lmms-eval."""
    tree = ast.parse((wheel / "lmms_eval" / file).read_text(encoding="utf-8"))
    body = [node for node in tree.body if getattr(node, "name", None) in names]
    for node in body:
        node.decorator_list = []
    namespace: dict[str, Any] = {"re": re, "np": np, "string": string, "random": Letterless, "statistics": statistics}
    exec(compile(ast.Module(body, []), file, "exec"), namespace)
    return namespace


class Letterless:
    """MMMU chooses at random where this package's score is 0."""

    choice = staticmethod(lambda letters: None)


def scores_of(wheel: Path) -> dict[str, Any]:
    metrics = load(wheel, "api/metrics.py", "anls", "exact_match_hf_evaluate", "levenshtein_distance")
    relaxed = load(wheel, "tasks/chartqa/utils.py", "relaxed_correctness")["relaxed_correctness"]
    choice = load(wheel, "tasks/_task_utils/mmmu_mcq_utils.py", "parse_mmmu_multi_choice_response")
    vqa = load(wheel, "tasks/vqav2/utils.py", "vqav2_process_results")
    vqa |= load(wheel, "tasks/_task_utils/vqa_eval_metric.py", "EvalAIAnswerProcessor")
    process = vqa["vqav2_process_results"]

    def vqa_accuracy(answer: str, references: list[str]) -> float:
        answers = [{"answer": reference, "answer_id": i} for i, reference in enumerate(references)]
        return process({"answers": answers, "question_id": 0}, [answer])["exact_match"]

    def multiple_choice(answer: str, references: list[str]) -> float:
        letter = choice["parse_mmmu_multi_choice_response"](answer, list(CHOICES), CHOICES)
        return float(letter in references)

    def exact_match(answer: str, references: list[str]) -> float:
        match = metrics["exact_match_hf_evaluate"]
        pairs = [([answer], [reference]) for reference in references]
        return max(float(match(*pair, ignore_case=True, ignore_punctuation=True)["exact_match"]) for pair in pairs)

    return {
        "exact_match": exact_match,
        "vqa_accuracy": vqa_accuracy,
        "anls": lambda answer, references: float(metrics["anls"](references, [answer])["anls"]),
        "relaxed_accuracy": lambda answer, references: float(any(relaxed(answer, r) for r in references)),
        "multiple_choice": multiple_choice,
    }


def random_case(generator: random.Random, metric: str) -> tuple[str, list[str]]:
    def text() -> str:
        words = generator.choices(CHOICE_WORDS if metric == "multiple_choice" else WORDS, k=generator.choice(LENGTHS))
        return generator.choice(("", " ", " ", " ")).join(words)

    if metric == "multiple_choice":
        return text(), generator.choices("ABCD", k=2)
    references = [text() for _ in range(generator.choice((2, 3, 10)))]
    answer = generator.choice((text(), generator.choice(references), generator.choice(references).upper()))
    return answer, references + generator.choices([answer, references[0]], k=generator.choice((0, 1, 4)))


def main(wheel: Path, number: int = 0) -> None:
    functions, generator, cases = scores_of(wheel), random.Random(0), []
    for i in range(number or NUM_CASES):
        for name, function in functions.items():
            answer, references = random_case(generator, name)
            if i < len(PAIRS) and name != "multiple_choice":
                answer, references = PAIRS[i][0], [PAIRS[i][1]] * 3
            expected = function(answer, references)
            found = METRICS[name](answer, references, QUESTION)
            assert abs(found - expected) < 1e-12, (name, answer, references, expected, found)
            cases.append([name, answer, references, expected])
    if not number:
        lines = ",\n".join(json.dumps(case) for case in cases)
        TABLE.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
