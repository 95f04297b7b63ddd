# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Command of `evaluation` that only answers."""

from pathlib import Path
from typing import Annotated

from typer import Option

from . import options


def predict(
    file: options.Samples,
    model: options.ServedModel,
    output: Annotated[Path, Option(help="A .jsonl file, which appears when all samples are answered.")],
    question: options.Question = None,
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
    """Answer the last question of each sample. The same command resumes an interrupted run."""
    from florence_vl_hf import evaluation

    answers = evaluation.predict(
        evaluation.load_questions(file, image_folder, split, question),
        model,
        output,
        server=server,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        dtype=options.torch_dtype(dtype),
        device=device,
        quantization_config=options.quantization(load_in_4bit, load_in_8bit),
    )
    errors = [record["error"] for record in answers if "error" in record]
    if len(errors) == len(answers):
        raise ValueError(f"No sample of {file} can be answered. Of the first: {errors[0]}")
    options.echo_once(
        f"Wrote {output}: {len(answers) - len(errors):,} answers, {len(errors):,} samples with an error."
    )
