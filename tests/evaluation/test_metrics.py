# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import json

import pytest

from florence_vl_hf.evaluation import METRICS, score

from .record_scores import QUESTION, TABLE


CASES = json.loads(TABLE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", METRICS)
def test_scores_are_those_of_lmms_eval(name):
    cases = [case for case in CASES if case[0] == name]
    assert len({case[3] for case in cases}) > 1
    for _, answer, references, expected in cases:
        assert METRICS[name](answer, references, QUESTION) == pytest.approx(expected, abs=1e-12), (answer, references)


@pytest.mark.parametrize(
    ("name", "answer", "references", "expected"),
    [
        ("exact_match", "Red.", ["red"], 1),
        ("exact_match", "red car", ["red"], 0),
        ("vqa_accuracy", "two", ["2"] * 2 + ["3"] * 8, 0.6),  # of ten sets of nine, two have one match, eight have two
        ("anls", "Pari", ["paris", "London"], 0.8),
        ("anls", "rome", ["paris"], 0),
        ("relaxed_accuracy", "104", ["100"], 1),
        ("relaxed_accuracy", "106", ["100"], 0),
        ("relaxed_accuracy", "5%", ["0.05"], 1),
        ("multiple_choice", "The answer is (B).", ["B"], 1),
        ("multiple_choice", "I think it is a red cat on grass", ["A"], 1),
        ("multiple_choice", "no idea", ["A"], 0),
    ],
)
def test_examples(name, answer, references, expected):
    assert METRICS[name](answer, references, QUESTION) == pytest.approx(expected)


@pytest.mark.parametrize(
    "question", ["Which?\n(A) cat\n(B) dog", "A) cat\nB) dog\nWhich?", "Q: Which?\n A. cat\n B. dog"]
)
def test_choices_of_a_question(question):
    assert METRICS["multiple_choice"]("So it must be a dog here", ["B"], question) == 1


def record(answer: str, *references: str) -> dict:
    return {"id": answer, "question": "?", "answer": answer, "references": list(references)}


def test_score():
    answers = [record("a", "a"), record("b", "c"), record("c"), {**record("x", "x"), "error": "broken"}] + 14 * [
        record("d", "d"), record("e", "f"), record("g", "h"),
    ]  # fmt: skip
    scores = score(answers, ["exact_match", "anls"])
    assert (scores["num_samples"], scores["num_scored"], scores["num_errors"]) == (46, 44, 1)
    assert scores["samples"][0] == {"id": "a", "exact_match": 1, "anls": 1}
    assert scores["samples"][2:4] == [{"id": "c"}, {"id": "x"}]
    result = scores["metrics"]["exact_match"]
    assert result["score"] == pytest.approx(15 / 44)
    # The normal approximation: 1.96 standard errors of 0.0715.
    assert result["confidence_interval"] == pytest.approx([15 / 44 - 0.14, 15 / 44 + 0.14], abs=0.025)
    assert score(answers, ["exact_match"])["metrics"]["exact_match"] == result


@pytest.mark.parametrize(
    ("metric", "answers", "message"),
    [
        ("bleu", [record("a", "a")], "no metric bleu; choose from exact_match"),
        ("exact_match", [record("a")], "nothing to score.$"),
        ("exact_match", [record("a"), {"id": "b", "error": "It is broken."}], "The first error: It is broken."),
        ("vqa_accuracy", [record("a", "a")], "Sample 'a': VQA accuracy requires several"),
        ("multiple_choice", [record("a", "A")], "Sample 'a': .* requires a question with choices"),
        ("multiple_choice", [{**record("a", "E"), "question": QUESTION}], "not among the choices A, B, C, D"),
    ],
)
def test_what_cannot_be_scored(metric, answers, message):
    with pytest.raises(ValueError, match=message):
        score(answers, [metric])
