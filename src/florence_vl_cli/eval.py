# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Command of `evaluation`."""

from pathlib import Path
from typing import Annotated

from typer import Option

from . import options


def evaluate(
    file: options.Samples,
    model: options.ServedModel,
    output: Annotated[Path, Option(help="Directory of answers.jsonl, scores.json and report.html.")],
    metric: Annotated[
        list[str] | None,
        Option(
            callback=options.split,
            help="One or more of exact_match, vqa_accuracy, anls, relaxed_accuracy and multiple_choice, separated by "
            "commas. By default, exact_match.",
        ),
    ] = None,
    image_folder: options.ImageFolder = None,
    split: options.Split = "train",
    server: options.Server = None,
    max_new_tokens: options.MaxNewTokens = 512,
    batch_size: options.BatchSize = 8,
    dtype: options.Dtype = None,
    device: options.Device = "auto",
    load_in_4bit: options.LoadIn4bit = False,
    load_in_8bit: options.LoadIn8bit = False,
) -> None:
    """Answer the last question of each sample, and score the answers. The same command resumes an interrupted run."""
    from florence_vl_hf import evaluation

    scores = evaluation.evaluate(
        evaluation.load_questions(file, image_folder, split),
        model,
        output,
        metric or ["exact_match"],
        server=server,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        dtype=options.torch_dtype(dtype),
        device=device,
        quantization_config=options.quantization(load_in_4bit, load_in_8bit),
    )
    options.echo_once(f"{evaluation.format_scores(scores)}\nOpen {output / 'report.html'} to see the samples.")
