# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Check a dataset before training: what is wrong with its samples, and how long they are."""

import copy
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import datasets
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..processing import FlorenceVLProcessor, load_chat_template
from .arguments import num_cores
from .collator import FlorenceVLCollator
from .samples import MAX_IMAGE_SIDE, Problem, SampleError, open_image, read_sample, require_answer, with_images


# Reported, but not an error.
NOTES = {Problem.TOO_LONG: " (training truncates them)"}
SAMPLES_PER_BATCH = 16
QUANTILES = {"shortest": 0, "10 %": 0.1, "median": 0.5, "90 %": 0.9, "99 %": 0.99, "longest": 1}
# Settings of an image processor that does nothing, where only tokens are needed.
UNPROCESSED = {"do_resize": False, "do_center_crop": False, "do_rescale": False, "do_normalize": False}


@dataclass
class SampleCheck:
    """The result for one sample. `num_turns` is 0 if it cannot be parsed; `num_tokens` includes image tokens."""

    id: str
    num_images: int = 0
    num_turns: int = 0
    num_tokens: int | None = None
    problems: list[SampleError] = field(default_factory=list)


@dataclass
class DataReport:
    """
    The result for a dataset.

    Args:
        num_broken (`int`): Samples that training skips or learns nothing from.
        images, turns, lengths (`Counter[int]`): How many samples have that many images, turns and tokens. Samples that
            cannot be parsed are in none of them; without a processor, `lengths` is empty.
        problems (`Counter[Problem]`): How often each problem occurs. A sample may have several.
        examples (`dict[Problem, list[str]]`): The first `num_examples` messages of each problem.
    """

    max_length: int
    num_examples: int = 5
    num_samples: int = 0
    num_broken: int = 0
    images: Counter[int] = field(default_factory=Counter)
    turns: Counter[int] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    problems: Counter[Problem] = field(default_factory=Counter)
    examples: dict[Problem, list[str]] = field(default_factory=lambda: defaultdict(list))

    @property
    def is_sound(self) -> bool:
        """Whether training can use every sample."""
        return self.num_broken == 0

    def add(self, check: SampleCheck) -> None:
        self.num_samples += 1
        self.num_broken += any(error.problem not in NOTES for error in check.problems)
        if check.num_turns:
            self.images[check.num_images] += 1
            self.turns[check.num_turns] += 1
        if check.num_tokens is not None:
            self.lengths[check.num_tokens] += 1
        for error in check.problems:
            error.sample_id = check.id
            self.problems[error.problem] += 1
            if self.problems[error.problem] <= self.num_examples:
                self.examples[error.problem].append(str(error))


def check_data(
    dataset: datasets.Dataset,
    processor: FlorenceVLProcessor | None = None,
    max_length: int = 2048,
    chat_template: str | None = None,
    num_workers: int | None = None,
    num_examples: int = 5,
    max_image_side: int = MAX_IMAGE_SIDE,
    report_file: str | Path | None = None,
) -> DataReport:
    """
    Read every sample of a dataset once, as training does, but without preprocessing its images.

    Args:
        dataset (`datasets.Dataset`): A dataset of `load_conversations`.
        processor (`FlorenceVLProcessor`, *optional*): The model's processor. Without it, lengths are not checked.
        max_length (`int`, *optional*, defaults to 2048): The number of tokens that training truncates samples to.
        chat_template (`str`, *optional*): One of `CHAT_TEMPLATES`, or a template. By default, the processor's own.
        num_workers (`int`, *optional*): Processes that read samples; 0 is this one. By default, one per core.
        num_examples (`int`, *optional*, defaults to 5): How many messages of each problem the report holds.
        max_image_side (`int`, *optional*, defaults to 12,000): An image with a longer side, in pixels, is broken.
        report_file (`str` or `Path`, *optional*): A file to write every problem to, as one line of JSON with `id`,
            `problem` and `message`. An existing file is overwritten if it is such a report.

    Raises:
        FileExistsError: If `report_file` is another file, such as the data.
    """
    collator = None
    if processor is not None:
        if chat_template is not None and "{" not in chat_template:
            chat_template = load_chat_template(chat_template, processor.tokenizer, processor.image_token)
        processor = copy.copy(processor)
        processor.chat_template = chat_template or processor.chat_template
        collator = FlorenceVLCollator(processor, max_length)
    batches = DataLoader(
        dataset,
        batch_size=SAMPLES_PER_BATCH,
        # Starting a process takes longer than reading a few samples.
        num_workers=min(num_cores() if num_workers is None else num_workers, len(dataset) // SAMPLES_PER_BATCH),
        collate_fn=partial(_check_samples, collator=collator, max_image_side=max_image_side),
    )
    report = DataReport(max_length, num_examples)
    checks = (check for batch in batches for check in batch)
    with _open_report(Path(report_file or os.devnull)) as file:
        for check in tqdm(checks, desc="Samples", total=len(dataset), leave=False):
            report.add(check)
            for error in check.problems:
                line = {"id": check.id, "problem": error.problem, "message": str(error)}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return report


def _open_report(path: Path) -> TextIO:
    if path.is_file() and path.stat().st_size:
        with open(path, encoding="utf-8", errors="replace") as file:
            line = file.readline(1 << 20)
        try:
            is_report = set(json.loads(line)) == {"id", "problem", "message"}
        except (TypeError, ValueError):
            is_report = False
        if not is_report:
            raise FileExistsError(f"{path} exists and is not a report; choose another file for the report.")
    return open(path, "w", encoding="utf-8")


def _check_samples(
    samples: list[dict[str, Any]], collator: FlorenceVLCollator | None, max_image_side: int
) -> list[SampleCheck]:
    checks = [SampleCheck(sample["id"]) for sample in samples]
    for sample, check in zip(samples, checks, strict=True):
        check.problems = list(_find_problems(sample, check, collator, max_image_side))
    return checks


def _find_problems(
    sample: dict[str, Any], check: SampleCheck, collator: FlorenceVLCollator | None, max_image_side: int
) -> Iterator[SampleError]:
    """Find all problems of a sample, and set the counts of `check`."""
    try:
        messages, images = read_sample(sample)
    except SampleError as error:
        yield error
        return
    check.num_images = len(images)
    check.num_turns = sum(message["role"] == "assistant" for message in messages)
    for image in images:
        try:
            open_image(image, max_image_side)
        except SampleError as error:
            yield error
    try:
        require_answer(messages)
        if collator is not None:
            blank_images = [Image.new("RGB", (1, 1))] * len(images)
            encoded = collator.tokenize(with_images(collator.shorten(messages), blank_images), **UNPROCESSED)
            check.num_tokens = len(encoded["input_ids"])
            if check.num_tokens > len(collator.truncate(encoded)["input_ids"]):
                reason = f"It has more than {collator.max_length:,} tokens, and is truncated; increase max_length."
                yield SampleError(reason, Problem.TOO_LONG)
    except SampleError as error:
        yield error


def format_report(report: DataReport) -> str:
    """Format a report for a terminal."""
    num_parsed, num_without = report.turns.total(), report.images[0]
    num_turns, num_images = (sum(counter.elements()) for counter in (report.turns, report.images))
    unreadable = f", {report.num_samples - num_parsed:,} unreadable" if num_parsed < report.num_samples else ""
    lines = [
        f"{report.num_samples:,} samples: {num_parsed - num_without:,} with images ({num_images:,} images), "
        f"{num_without:,} without{unreadable}; {num_turns / max(num_parsed, 1):.1f} turns on average, "
        f"{max(report.turns, default=0):,} at most."
    ]
    for problem in Problem:
        if count := report.problems[problem]:
            note, messages = NOTES.get(problem, ""), report.examples[problem]
            lines += ["", f"{problem}: {count:,}{note}", *(f"  {message}" for message in messages)]
            if count > len(messages):
                lines.append(f"  … and {count - len(messages):,} more")
    note = "Lengths were not counted; set --model to count them with the model's tokenizer."
    if lengths := sorted(report.lengths.elements()):
        values = {name: lengths[round(share * (len(lengths) - 1))] for name, share in QUANTILES.items()}
        formatted = ", ".join(f"{name} {value:,}" for name, value in values.items())
        note = (
            f"Tokens per sample: mean {sum(lengths) / len(lengths):,.0f}, {formatted}; "
            f"max_length is {report.max_length:,}."
        )
    broken = f"{report.num_broken:,} of {report.num_samples:,} samples have problems."
    lines += ["", note, "", f"All {report.num_samples:,} samples are valid." if report.is_sound else broken]
    return "\n".join(lines)


__all__ = ["DataReport", "SampleCheck", "check_data", "format_report"]
