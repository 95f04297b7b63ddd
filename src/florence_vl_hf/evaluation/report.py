# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""An HTML report of answers and their scores, in one file without links."""

from pathlib import Path
from typing import Any

import datasets

from ..conversion.checkpoint_files import write_file
from ..processing.images import data_url
from ..templates import template_environment
from ..training.samples import SampleError, open_image, read_sample


# Longest side of an image, in pixels.
THUMBNAIL_SIZE = 320


def write_report(
    path: str | Path, samples: datasets.Dataset, answers: list[dict[str, Any]], scores: dict[str, Any], title: str
) -> None:
    """
    Write a report that browsers open without a network.

    Args:
        path (`str` or `Path`): An `.html` file.
        samples (`datasets.Dataset`): Samples of `load_questions`, for their images.
        answers (`list[dict]`): Their answers, of `predict`.
        scores (`dict`): The answers' scores, of `score`.
        title (`str`): The report's title.
    """
    environment = template_environment(Path(__file__).parent, autoescape=True)
    rows = (
        {**record, "scores": sample_scores, "thumbnails": _thumbnails(sample)}
        for sample, record, sample_scores in zip(samples, answers, scores["samples"], strict=True)
    )
    template = environment.get_template("report.html.jinja")
    write_file(Path(path), template.render(title=title, scores=scores, rows=rows))


def _thumbnails(sample: dict[str, Any]) -> list[str]:
    try:
        images = [open_image(image) for image in read_sample(sample).images]
    except SampleError:  # described by the answer's `error`
        return []
    for image in images:
        image.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
    return [data_url(image, "JPEG", quality=80) for image in images]


__all__ = ["write_report"]
