# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Reading of a whole dataset before it is trained on: what is wrong with it, and how long its samples are."""

import copy
import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import datasets
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers.processing_utils import ImagesKwargs

from ..processing import FlorenceVLProcessor, load_chat_template
from .conversation_data import Problem, SampleError, insert_pictures, open_picture, read_messages


# What training takes as it is: told, but no reason to fail.
NOTES = {Problem.TOO_LONG: "training cuts them"}
ROWS_PER_BATCH = 16
HISTOGRAM_ROWS = 16
HISTOGRAM_WIDTH = 40
QUANTILES = {"median": 0.5, "90 %": 0.9, "99 %": 0.99}


@dataclass(frozen=True)
class SampleCheck:
    """
    What was found in one sample.

    Args:
        num_rounds (`int`): Of question and answer. 0 where the row cannot be read as a conversation.
        num_tokens (`int`, *optional*): With those of pictures. `None` where they were not or cannot be counted.
        problems (`list[SampleError]`): Each names the sample.
    """

    id: str
    num_pictures: int = 0
    num_rounds: int = 0
    num_tokens: int | None = None
    problems: list[SampleError] = field(default_factory=list)


@dataclass
class DataReport:
    """
    What was found in a dataset.

    Args:
        num_broken (`int`): Samples that training refuses or learns nothing from, those that are unreadable included.
        num_unreadable (`int`): Samples whose row is no conversation. The numbers below are of the others.
        lengths (`Counter[int]`): How many samples have so many tokens. Empty without a tokenizer.
        problems (`Counter[Problem]`): How often each occurs; a sample may have several.
        examples (`dict[Problem, list[str]]`): The messages of the first few of each kind.
    """

    max_length: int
    num_examples: int = 5
    num_samples: int = 0
    num_broken: int = 0
    num_unreadable: int = 0
    num_with_pictures: int = 0
    num_pictures: int = 0
    num_rounds: int = 0
    max_rounds: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    problems: Counter[Problem] = field(default_factory=Counter)
    examples: dict[Problem, list[str]] = field(default_factory=dict)

    @property
    def is_sound(self) -> bool:
        """Whether training takes every sample."""
        return self.num_broken == 0

    def add(self, check: SampleCheck) -> None:
        self.num_samples += 1
        self.num_broken += any(error.problem not in NOTES for error in check.problems)
        self.num_unreadable += check.num_rounds == 0
        self.num_with_pictures += check.num_pictures > 0
        self.num_pictures += check.num_pictures
        self.num_rounds += check.num_rounds
        self.max_rounds = max(self.max_rounds, check.num_rounds)
        if check.num_tokens is not None:
            self.lengths[check.num_tokens] += 1
        for error in check.problems:
            self.problems[error.problem] += 1
            examples = self.examples.setdefault(error.problem, [])
            if len(examples) < self.num_examples:
                examples.append(str(error))


def check_data(
    dataset: datasets.Dataset,
    processor: FlorenceVLProcessor | None = None,
    max_length: int = 2048,
    chat_template: str | None = None,
    num_workers: int | None = None,
    num_examples: int = 5,
    report_file: str | Path | None = None,
) -> DataReport:
    """
    Read every sample of a dataset once, as training would, but without preprocessing its pictures.

    Args:
        dataset (`datasets.Dataset`): As `load_conversations` gives it.
        processor (`FlorenceVLProcessor`, *optional*): The model's, to count tokens with. Without, lengths are not
            checked.
        max_length (`int`, *optional*, defaults to 2048): What training cuts samples at, in tokens.
        chat_template (`str`, *optional*): Instead of the processor's own, one of `CHAT_TEMPLATES`.
        num_workers (`int`, *optional*): Processes that read; 0 is this one. By default, one per core.
        num_examples (`int`, *optional*, defaults to 5): How many problems of each kind the report keeps.
        report_file (`str` or `Path`, *optional*): Where every problem is written, as one line of JSON with `id`,
            `problem` and `message`.
    """
    if num_workers is None:
        num_workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # A process costs more to start than a few samples to read.
    num_workers = min(num_workers, len(dataset) // ROWS_PER_BATCH)
    batches = DataLoader(
        dataset,
        batch_size=ROWS_PER_BATCH,
        num_workers=num_workers,
        collate_fn=_Checker(processor, max_length, chat_template),
    )
    report = DataReport(max_length=max_length, num_examples=num_examples)
    file = None if report_file is None else open(report_file, "w", encoding="utf-8")
    try:
        with tqdm(total=len(dataset), desc="Samples", leave=False) as progress:
            for checks in batches:
                for check in checks:
                    report.add(check)
                    for error in check.problems if file else []:
                        line = {"id": check.id, "problem": error.problem, "message": str(error)}
                        file.write(json.dumps(line, ensure_ascii=False) + "\n")
                progress.update(len(checks))
    finally:
        if file:
            file.close()
    return report


def format_report(report: DataReport) -> str:
    """The report as text for a terminal."""
    num_readable = report.num_samples - report.num_unreadable
    unreadable = f", {report.num_unreadable:,} unreadable" if report.num_unreadable else ""
    lines = [
        f"{report.num_samples:,} samples: {report.num_with_pictures:,} with pictures ({report.num_pictures:,} "
        f"pictures), {num_readable - report.num_with_pictures:,} without{unreadable}; "
        f"{report.num_rounds / max(num_readable, 1):.1f} rounds on average, {report.max_rounds:,} at most."
    ]
    for problem in Problem:
        if count := report.problems[problem]:
            note = f" ({NOTES[problem]})" if problem in NOTES else ""
            lines += ["", f"{problem}: {count:,}{note}", *(f"  {message}" for message in report.examples[problem])]
            if (hidden := count - len(report.examples[problem])) > 0:
                lines.append(f"  … and {hidden:,} more")
    lines += ["", *_format_lengths(report.lengths, report.max_length), ""]
    if report.is_sound:
        lines.append(f"All {report.num_samples:,} samples are sound.")
    else:
        lines.append(f"{report.num_broken:,} of {report.num_samples:,} samples have problems.")
    return "\n".join(lines)


def _format_lengths(lengths: Counter[int], max_length: int) -> list[str]:
    if not lengths:
        return ["Lengths were not counted: that takes the model's tokenizer, named by --model."]
    total, longest = lengths.total(), max(lengths)
    figures = [f"mean {sum(length * count for length, count in lengths.items()) / total:,.0f}"]
    figures += [f"{name} {_quantile(lengths, share):,}" for name, share in QUANTILES.items()]
    lines = [f"Tokens per sample: {', '.join(figures)}, longest {longest:,}; max_length is {max_length:,}."]

    width = 1
    while longest // width >= HISTOGRAM_ROWS:
        width *= 2
    bins: Counter[int] = Counter()
    for length, count in lengths.items():
        bins[length // width] += count
    digits, highest = len(f"{longest + width:,}"), max(bins.values())
    for row in range(min(bins), max(bins) + 1):
        bar = "#" * -(-HISTOGRAM_WIDTH * bins[row] // highest)
        span = f"{row * width:>{digits},} - {(row + 1) * width - 1:>{digits},}"
        lines.append(f"  {span}  {bins[row]:>{len(f'{highest:,}')},}  {bar}".rstrip())
    return lines


def _quantile(lengths: Counter[int], share: float) -> int:
    """The shortest length that so large a share of samples does not exceed."""
    seen, total = 0, lengths.total()
    for length in sorted(lengths):
        seen += lengths[length]
        if seen >= share * total:
            return length
    return max(lengths)


class _Checker:
    """Checks rows, in processes of a `DataLoader`."""

    def __init__(self, processor: FlorenceVLProcessor | None, max_length: int, chat_template: str | None) -> None:
        self.max_length = max_length
        self.count_tokens = None if processor is None else _TokenCounter(processor, chat_template)

    def __call__(self, rows: list[dict[str, Any]]) -> list[SampleCheck]:
        return [self.check(row) for row in rows]

    def check(self, row: dict[str, Any]) -> SampleCheck:
        try:
            messages, pictures = read_messages(row)
        except SampleError as error:
            return SampleCheck(row["id"], problems=[error])
        problems = []
        for picture in pictures:
            try:
                open_picture(picture, row)
            except SampleError as error:
                problems.append(error)
        num_tokens, complaints = self._complaints(messages)
        problems += [SampleError(f"Sample {row['id']!r}: {reason}.", problem) for problem, reason in complaints]
        return SampleCheck(
            row["id"],
            num_pictures=len(pictures),
            num_rounds=sum(message["role"] == "assistant" for message in messages),
            num_tokens=num_tokens,
            problems=problems,
        )

    def _complaints(self, messages: list[dict[str, Any]]) -> tuple[int | None, list[tuple[Problem, str]]]:
        """The number of tokens, and what they, or the lack of them, are to be blamed for."""
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        is_empty = not any(item["text"].strip() for answer in answers for item in answer)
        complaints = [(Problem.NOTHING_TO_LEARN, "no answer has any text; leave the sample out")] if is_empty else []
        if self.count_tokens is None:
            return None, complaints
        tokens = self.count_tokens(messages)
        remedy = f"max_length is {self.max_length:,}; raise it, or leave the sample out"
        if tokens.end_of_pictures > self.max_length:
            found = f"its pictures end after token {tokens.end_of_pictures:,}"
            complaints.append((Problem.PICTURES_TOO_LONG, f"{found}; {remedy}"))
        elif tokens.total > self.max_length:
            complaints.append((Problem.TOO_LONG, f"it has {tokens.total:,} tokens; {remedy}"))
        if tokens.start_of_answers is None:
            found = "the chat template marks no answer; use one with {% generation %} around what the assistant says"
            complaints.append((Problem.NOTHING_TO_LEARN, found))
        elif tokens.start_of_answers >= self.max_length and not is_empty:
            found = f"its first answer begins after token {tokens.start_of_answers:,}"
            complaints.append((Problem.NOTHING_TO_LEARN, f"{found}; {remedy}"))
        return tokens.total, complaints


@dataclass(frozen=True)
class _Tokens:
    """Where things are in a sample, in tokens."""

    total: int
    end_of_pictures: int
    start_of_answers: int | None


class _TokenCounter:
    """The processor itself, with its images' tokens and its chat template, but for the work on pixels."""

    def __init__(self, processor: FlorenceVLProcessor, chat_template: str | None) -> None:
        if chat_template is not None and "{" not in chat_template:
            # Once, rather than for each sample.
            chat_template = load_chat_template(chat_template, processor.tokenizer, processor.image_token)
        self.chat_template = chat_template
        self.processor = copy.copy(processor)
        self.processor.image_processor = _NoPixels()
        self.blank = Image.new("RGB", (1, 1))

    def __call__(self, messages: list[dict[str, Any]]) -> _Tokens:
        num_pictures = sum(item["type"] == "image" for message in messages for item in message["content"])
        encoded = self.processor.apply_chat_template(
            insert_pictures(messages, [self.blank] * num_pictures),
            chat_template=self.chat_template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            # The report tells of what is too long.
            processor_kwargs={"text_kwargs": {"verbose": False}},
        )
        ids, is_said = encoded["input_ids"][0], encoded["assistant_masks"][0]
        return _Tokens(
            total=len(ids),
            end_of_pictures=max(
                (i + 1 for i, token in enumerate(ids) if token == self.processor.image_token_id), default=0
            ),
            start_of_answers=is_said.index(1) if 1 in is_said else None,
        )


class _NoPixels:
    """Stands where an image processor does, and makes nothing of pictures."""

    valid_kwargs = ImagesKwargs
    model_input_names: ClassVar[list[str]] = []

    def fetch_images(self, images: Any) -> Any:
        return images

    def __call__(self, images: Any, **kwargs: Any) -> dict[str, Any]:
        return {}


__all__ = ["DataReport", "SampleCheck", "check_data", "format_report"]
