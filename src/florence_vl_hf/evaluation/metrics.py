# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Metrics of visual question answering. Each gives the same scores as lmms-eval's function for it."""

import re
import string
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from rapidfuzz.distance import Levenshtein


# Score of an answer between 0 and 1, given the reference answers and the question.
Metric = Callable[[str, list[str], str], float]

CONFIDENCE = 0.95
NUM_RESAMPLES = 1000
# Of ANLS: an answer that is less similar to the reference scores 0.
MIN_SIMILARITY = 0.5
# Of relaxed accuracy.
MAX_RELATIVE_CHANGE = 0.05
# Of VQA accuracy: as many other annotators must have given an answer for it to score 1.
NUM_AGREEING = 3

NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# VQA's official normalization, in which none is a number, and few of all English contractions get their apostrophe.
VQA_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
VQA_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
VQA_WORDS = {name: str(number) for number, name in enumerate(VQA_NUMBERS)} | {"none": "0"}
VQA_ARTICLES = ("a", "an", "the")
VQA_CONTRACTIONS = """
'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
there'd've there're there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're
what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
""".split()
VQA_WORDS |= {word[:i] + word[i + 1 :]: word for word in VQA_CONTRACTIONS for i in range(len(word)) if word[i] == "'"}
VQA_WORDS["somebody'd"] = "somebodyd"
# A choice in a question, on a line of its own: "A. a cat", "(A) a cat" or "A) a cat".
CHOICE = re.compile(r"^[ \t]*\(?([A-Z])[.)][ \t]+(.*?)[ \t]*$", re.MULTILINE)


def exact_match(answer: str, references: list[str], question: str = "") -> float:
    """Whether the answer is one of the references, up to case and ASCII punctuation."""
    return float(_plain(answer) in map(_plain, references))


def _plain(text: str) -> str:
    return text.lower().translate(NO_PUNCTUATION)


def vqa_accuracy(answer: str, references: list[str], question: str = "") -> float:
    """
    Share of three annotators that gave this answer, at most 1: the mean over all sets of references without one.

    Raises:
        ValueError: If there are not several references.
    """
    if len(references) < 2:
        raise ValueError("VQA accuracy requires several reference answers, a list in `answers`.")
    answer = _normalize_vqa(answer)
    matches = [_normalize_vqa(reference) == answer for reference in references]
    return float(np.mean([min(1, (sum(matches) - match) / NUM_AGREEING) for match in matches]))


def _normalize_vqa(text: str) -> str:
    text = text.replace("\n", " ").replace("\t", " ").strip()
    has_thousands = re.search(r"\d,+\d", text) is not None
    result = text
    for mark in VQA_PUNCTUATION:
        is_apart = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if is_apart or has_thousands else " ")
    # The original gives a flag, 32, in place of the number of replacements.
    result = re.sub(r"\.(?!\d)", "", result, count=32)
    words = [word for word in result.lower().split() if word not in VQA_ARTICLES]
    return " ".join(VQA_WORDS.get(word, word) for word in words)


def anls(answer: str, references: list[str], question: str = "") -> float:
    """Average normalized Levenshtein similarity to the most similar reference, 0 below a half."""
    similarity = max(_similarity(answer, reference) for reference in references)
    return similarity if similarity >= MIN_SIMILARITY else 0.0


def _similarity(answer: str, reference: str) -> float:
    # Lengths are those before whitespace is removed, in upper case, which some letters change.
    length = max(len(answer.upper()), len(reference.upper()))
    distance = Levenshtein.distance(" ".join(answer.lower().split()), " ".join(reference.lower().split()))
    return 1 - distance / length if length else 1.0


def relaxed_accuracy(answer: str, references: list[str], question: str = "") -> float:
    """Whether the answer is one of the references up to case or, as a number, up to 5 %."""
    return float(any(_is_close(answer, reference) for reference in references))


def _is_close(answer: str, reference: str) -> bool:
    value, expected = _to_float(answer), _to_float(reference)
    if value is not None and expected:
        return abs(value - expected) / abs(expected) <= MAX_RELATIVE_CHANGE
    return answer.lower() == reference.lower()


def _to_float(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def multiple_choice(answer: str, references: list[str], question: str) -> float:
    """
    Whether the letter in the answer is that of a reference, found as in MMMU. Without a letter, where MMMU draws one
    at random, the score is 0.

    Raises:
        ValueError: If the question has no choices, each on a line such as `A. a cat`, or a reference is none of them.
    """
    choices = dict(CHOICE.findall(question))
    if not choices:
        raise ValueError("Multiple choice requires a question with choices, each on a line such as 'A. a cat'.")
    letters = [find_choice(reference, choices) for reference in references]
    if None in letters:
        raise ValueError(f"The reference answers {references} are not among the choices {', '.join(choices)}.")
    return float(find_choice(answer, choices) in letters)


def find_choice(answer: str, choices: dict[str, str]) -> str | None:
    """Find the last letter in an answer, or else the last text of a choice, and return the letter."""
    for mark in ",.!?;:'":
        answer = answer.strip(mark)
    answer = f" {answer} "
    # How a letter is recognized, and what is searched for if there are several.
    for form, precise_form in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        if found := [letter for letter in choices if form.format(letter) in answer]:
            return max(found, key=lambda letter: answer.rfind(precise_form.format(letter)))
    answer = answer.lower()
    texts = choices if len(answer.split()) > 5 else {}
    found = [letter for letter in texts if choices[letter].lower() in answer]
    return max(found, key=lambda letter: answer.rfind(choices[letter].lower()), default=None)


METRICS: dict[str, Metric] = {
    metric.__name__: metric for metric in (exact_match, vqa_accuracy, anls, relaxed_accuracy, multiple_choice)
}


def score(answers: list[dict[str, Any]], metrics: Iterable[str] = ("exact_match",)) -> dict[str, Any]:
    """
    Score answers of `predict`.

    Args:
        answers (`list[dict]`): Answers of `predict`. Those with an `error`, or without references, have no score.
        metrics (iterable of `str`, *optional*): Names in `METRICS`.

    Returns:
        `dict`: `num_samples`, `num_errors`, `num_scored`; `metrics`, with the mean of each metric as `score`, and the
        95 % `confidence_interval` of a bootstrap; `samples`, with the `id` and the scores of each sample.

    Raises:
        ValueError: If a metric cannot be computed, or no answer has references.
    """
    metrics = list(metrics)
    if unknown := set(metrics) - set(METRICS):
        raise ValueError(f"There is no metric {', '.join(sorted(unknown))}; choose from {', '.join(METRICS)}.")
    samples = [{"id": record["id"], **_score_sample(record, metrics)} for record in answers]
    scored = [sample for sample in samples if len(sample) > 1]
    if not scored:
        first_error = next((f" The first error: {record['error']}" for record in answers if "error" in record), "")
        raise ValueError(
            f"No sample has both an answer and a reference answer; there is nothing to score.{first_error}"
        )
    return {
        "num_samples": len(answers),
        "num_errors": sum("error" in record for record in answers),
        "num_scored": len(scored),
        "metrics": {name: _summarize([sample[name] for sample in scored]) for name in metrics},
        "samples": samples,
    }


def _score_sample(record: dict[str, Any], metrics: list[str]) -> dict[str, float]:
    if "error" in record or not record["references"]:
        return {}
    try:
        return {name: METRICS[name](record["answer"], record["references"], record["question"]) for name in metrics}
    except ValueError as error:
        raise ValueError(f"Sample {record['id']!r}: {error}") from error


def _summarize(scores: list[float]) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    means = [generator.choice(scores, len(scores)).mean() for _ in range(NUM_RESAMPLES)]
    tail = (1 - CONFIDENCE) / 2
    return {"score": float(np.mean(scores)), "confidence_interval": np.quantile(means, [tail, 1 - tail]).tolist()}


__all__ = ["METRICS", "Metric", "score"]
