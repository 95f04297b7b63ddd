# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Check a whole dataset before training: what is wrong with its samples, and how long they are."""

import copy
import json
import math
import os
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TextIO

import datasets
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers.processing_utils import ImagesKwargs

from ..processing import FlorenceVLProcessor, load_chat_template
from .collator import IGNORED_LABEL, FlorenceVLCollator
from .samples import Message, Problem, SampleError, open_image, read_sample


# Reported, but not an error.
NOTES = {Problem.TOO_LONG: "training truncates them"}
SAMPLES_PER_BATCH = 16
HISTOGRAM_ROWS = 16
HISTOGRAM_WIDTH = 40
QUANTILES = {"median": 0.5, "90 %": 0.9, "99 %": 0.99}


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
    examples: dict[Problem, list[str]] = field(default_factory=dict)

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
    Read every sample of a dataset once, as training does, but without preprocessing its images.

    Args:
        dataset (`datasets.Dataset`): A dataset of `load_conversations`.
        processor (`FlorenceVLProcessor`, *optional*): The model's processor. Without it, lengths are not checked.
        max_length (`int`, *optional*, defaults to 2048): The number of tokens that training truncates samples to.
        chat_template (`str`, *optional*): One of `CHAT_TEMPLATES`, or a template. By default, the processor's own.
        num_workers (`int`, *optional*): Processes that read samples; 0 is this one. By default, one per core.
        num_examples (`int`, *optional*, defaults to 5): How many messages of each problem the report holds.
        report_file (`str` or `Path`, *optional*): A file to write every problem to, as one line of JSON with `id`,
            `problem` and `message`. An existing file is overwritten if it is such a report.

    Raises:
        FileExistsError: If `report_file` is another file, such as the data.
    """
    if num_workers is None:
        num_workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    batches = DataLoader(
        dataset,
        batch_size=SAMPLES_PER_BATCH,
        # Starting a process takes longer than reading a few samples.
        num_workers=min(num_workers, len(dataset) // SAMPLES_PER_BATCH),
        collate_fn=_SampleChecker(processor, max_length, chat_template),
    )
    report = DataReport(max_length=max_length, num_examples=num_examples)
    with (
        nullcontext() if report_file is None else _open_report(Path(report_file)) as file,
        tqdm(total=len(dataset), desc="Samples", leave=False) as progress,
    ):
        for checks in batches:
            for check in checks:
                report.add(check)
                lines = [{"id": check.id, "problem": error.problem, "message": str(error)} for error in check.problems]
                if file is not None:
                    file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            progress.update(len(checks))
    return report


def _open_report(path: Path) -> TextIO:
    if path.exists() and path.stat().st_size:
        try:
            with open(path, encoding="utf-8") as file:
                is_report = json.loads(file.readline(1 << 20)).keys() == {"id", "problem", "message"}
        except (ValueError, AttributeError):
            is_report = False
        if not is_report:
            raise FileExistsError(f"{path} exists and is not a report; choose another file for the report.")
    return open(path, "w", encoding="utf-8")


class _SampleChecker:
    """Checks batches of samples, in the workers of a `DataLoader`."""

    def __init__(self, processor: FlorenceVLProcessor | None, max_length: int, chat_template: str | None) -> None:
        self.max_length = max_length
        self.collator = None
        if processor is not None:
            processor = copy.copy(processor)
            processor.image_processor = _NoPixels()
            if chat_template is not None and "{" not in chat_template:
                chat_template = load_chat_template(chat_template, processor.tokenizer, processor.image_token)
            processor.chat_template = chat_template or processor.chat_template
            self.collator = FlorenceVLCollator(processor)

    def __call__(self, samples: list[dict[str, Any]]) -> list[SampleCheck]:
        return [self.check(sample) for sample in samples]

    def check(self, sample: dict[str, Any]) -> SampleCheck:
        check = SampleCheck(sample["id"])
        try:
            read = read_sample(sample)
            check.num_images = len(read.images)
            check.num_turns = sum(message["role"] == "assistant" for message in read.messages)
            for image in read.images:
                try:
                    open_image(image)
                except SampleError as error:
                    check.problems.append(error)
            self._check_tokens(read.messages, check)
        except SampleError as error:
            check.problems.append(error)
        for problem in check.problems:
            problem.sample_id = check.id
        return check

    def _check_tokens(self, messages: list[Message], check: SampleCheck) -> None:
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        has_text = any(item["text"].strip() for answer in answers for item in answer)
        nothing_to_learn = None if has_text else "No answer has any text; remove the sample."
        if self.collator is not None:
            blank = [Image.new("RGB", (1, 1))] * check.num_images
            encoded = self.collator.encode({"messages": messages, "images": blank})
            ids, labels = encoded["input_ids"].tolist(), encoded["labels"].tolist()
            image_token_id, check.num_tokens = self.collator.processor.image_token_id, len(ids)
            advice = f"{self.max_length:,} tokens; increase max_length, or remove the sample."
            if ids[: self.max_length].count(image_token_id) < ids.count(image_token_id):
                check.problems.append(SampleError(f"Its images do not fit into {advice}", Problem.IMAGES_TOO_LONG))
            elif len(ids) > self.max_length:
                reason = f"It has {len(ids):,} tokens, and is truncated to {advice}"
                check.problems.append(SampleError(reason, Problem.TOO_LONG))
            if set(labels) == {IGNORED_LABEL}:
                nothing_to_learn = "The chat template has no {% generation %} around the answers; use one that has."
            elif has_text and set(labels[: self.max_length]) == {IGNORED_LABEL}:
                nothing_to_learn = f"Its first answer begins after {advice}"
        if nothing_to_learn:
            check.problems.append(SampleError(nothing_to_learn, Problem.NOTHING_TO_LEARN))


class _NoPixels:
    """Takes the place of an image processor where only tokens are needed."""

    valid_kwargs = ImagesKwargs
    model_input_names: ClassVar[list[str]] = []

    def fetch_images(self, images: Any) -> Any:
        return images

    def __call__(self, images: Any, **kwargs: Any) -> dict[str, Any]:
        return {}


def format_report(report: DataReport) -> str:
    """Format a report for a terminal."""
    num_parsed, num_without = report.turns.total(), report.images[0]
    num_turns = sum(turns * count for turns, count in report.turns.items())
    num_images = sum(images * count for images, count in report.images.items())
    unreadable = f", {report.num_samples - num_parsed:,} unreadable" if num_parsed < report.num_samples else ""
    lines = [
        f"{report.num_samples:,} samples: {num_parsed - num_without:,} with images ({num_images:,} images), "
        f"{num_without:,} without{unreadable}; {num_turns / max(num_parsed, 1):.1f} turns on average, "
        f"{max(report.turns, default=0):,} at most."
    ]
    for problem in Problem:
        if count := report.problems[problem]:
            note = f" ({NOTES[problem]})" if problem in NOTES else ""
            lines += ["", f"{problem}: {count:,}{note}", *(f"  {message}" for message in report.examples[problem])]
            if (hidden := count - len(report.examples[problem])) > 0:
                lines.append(f"  … and {hidden:,} more")
    lines += ["", *_format_lengths(sorted(report.lengths.elements()), report.max_length), ""]
    if report.is_sound:
        lines.append(f"All {report.num_samples:,} samples are valid.")
    else:
        lines.append(f"{report.num_broken:,} of {report.num_samples:,} samples have problems.")
    return "\n".join(lines)


def _format_lengths(lengths: list[int], max_length: int) -> list[str]:
    if not lengths:
        return ["Lengths were not counted; set --model to count them with the model's tokenizer."]
    total, longest = len(lengths), lengths[-1]
    quantiles = [f"{name} {lengths[math.ceil(share * total) - 1]:,}" for name, share in QUANTILES.items()]
    values = ", ".join([f"mean {sum(lengths) / total:,.0f}", *quantiles, f"longest {longest:,}"])
    lines = [f"Tokens per sample: {values}; max_length is {max_length:,}."]
    # The power of two that gives at most HISTOGRAM_ROWS rows.
    width = 1 << (longest // HISTOGRAM_ROWS).bit_length()
    bins = Counter(length // width for length in lengths)
    highest = max(bins.values())
    for row in range(min(bins), max(bins) + 1):
        bar = "#" * math.ceil(HISTOGRAM_WIDTH * bins[row] / highest)
        span = " - ".join(f"{value:>{len(f'{longest + width:,}')},}" for value in (row * width, (row + 1) * width - 1))
        lines.append(f"  {span}  {bins[row]:>{len(f'{highest:,}')},}  {bar}".rstrip())
    return lines


__all__ = ["DataReport", "SampleCheck", "check_data", "format_report"]
