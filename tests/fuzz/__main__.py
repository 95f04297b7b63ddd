# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Try random inputs, and print how many were tried and how many went wrong."""

import logging
import os
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated

import datasets
import torch
import typer
from typer import Argument, Option

from florence_vl_hf import FlorenceVLProcessor

from . import chats, files, images, interruptions
from .harness import Case, run_cases, run_python
from .inputs import write_inputs


# Cases of each part at `--scale 1`.
NUM_CASES = {"images": 10_000, "chats": 10_000 // chats.SAMPLES_PER_CASE, "files": 2_000}
NUM_CASES |= {f"kill {command}": 50 for command in interruptions.COMMANDS}
NUM_CASES |= {f"full disk {command}": 20 for command in interruptions.COMMANDS}


def build_cases(inputs: Path) -> dict[str, Case]:
    """Return the case of each part of `NUM_CASES`, with its inputs."""
    processor = FlorenceVLProcessor.from_pretrained(inputs / "converted")
    cases: dict[str, Case] = {
        "images": partial(images.check, processor=processor),
        "chats": partial(chats.check, processor=processor),
        "files": partial(files.check, inputs=inputs),
    }
    for command in interruptions.COMMANDS:
        cases[f"kill {command}"] = partial(interruptions.check_kill, inputs=inputs, command=command)
        cases[f"full disk {command}"] = partial(interruptions.check_full_disk, inputs=inputs, command=command)
    return cases


def fuzz(scale: float, seed: int, parts: list[str], only: int | None, directory: Path) -> dict[str, dict[int, str]]:
    """Run all cases of the parts, print each as one line of a table, and return what was wrong by part and number."""
    # One thread: the cases run side by side, and fork.
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["TQDM_DISABLE"] = "1"
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    datasets.config.HF_DATASETS_CACHE = directory / "datasets"
    inputs = directory / "inputs"
    inputs.mkdir()
    # In a child, since libraries start threads that a fork does not take along.
    if (written := run_python(lambda: write_inputs(inputs), directory / "log")).exit_code:
        raise RuntimeError(f"The inputs cannot be written: {written.output}")
    files.check_intact(directory, inputs)

    typer.echo(f"{'part':<20} {'tried':>7} {'wrong':>7}")
    wrong = {}
    for part, case in build_cases(inputs).items():
        if not any(part.startswith(given) for given in parts or [part]):
            continue
        numbers = range(max(1, round(scale * NUM_CASES[part]))) if only is None else range(only, only + 1)
        wrong[part] = run_cases(part.replace(" ", "-"), case, numbers, seed, len(os.sched_getaffinity(0)))
        tried = len(numbers) * (chats.SAMPLES_PER_CASE if part == "chats" else 1)
        typer.echo(f"{part:<20} {tried:>7,} {len(wrong[part]):>7,}")
    return wrong


def main(
    parts: Annotated[
        list[str] | None, Argument(help="Parts to run, or how their names begin. By default, all.")
    ] = None,
    scale: Annotated[float, Option(help="Factor of the number of cases.")] = 1.0,
    seed: Annotated[int, Option(help="Seed of all cases.")] = 0,
    only: Annotated[int | None, Option(help="Run one case, by its number.")] = None,
) -> None:
    """Try random images, chats, damaged files, kills and full disks. The exit code is 1 if anything went wrong."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as directory:
        wrong = fuzz(scale, seed, parts or [], only, Path(directory))
    for part, problems in wrong.items():
        for number, problem in sorted(problems.items())[:20]:
            typer.echo(f"\n{part}, --only {number}: {problem}")
    raise typer.Exit(int(any(wrong.values())))


if __name__ == "__main__":
    typer.run(main)
