# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Ablations: variants of a model, each trained and evaluated in the same way with several seeds."""

import json
from contextlib import ExitStack
from typing import Any

from accelerate.utils.memory import clear_device_cache
from tqdm import tqdm
from transformers.utils import logging

from ..conversion.checkpoint_files import CheckpointError, locked, write_file
from ..evaluation import evaluate
from ..training import train
from .ablation_grid import Grid, Run, read_grid
from .ablation_results import write_results


logger = logging.get_logger(__name__)


def ablate(settings: dict[str, Any]) -> str | None:
    """
    Train each variant of a model with each seed, evaluate it, and write a table and a plot of the scores.

    All runs of a seed start from the same weights where their shapes allow, and read the same data in the same order.
    The same grid again resumes an interrupted one, and finished runs are not repeated. Several processes may work on
    one grid at the same time: each run is done by one of them.

    Args:
        settings (`dict[str, Any]`): Settings of a recipe, as returned by `read_recipe`. `eval_file` is required, and
            `{seed}` in `model_name_or_path` is replaced by the seed. In addition:

            - `variants` (`dict[str, dict]`): `fusion_strategy` and `fusion_features` of each variant, by its name.
            - `seeds` (`list[int]`): One run of each variant per seed.
            - `metrics` (`list[str]`, *optional*): As in `evaluate`.

    Returns:
        `str` or `None`: The table in Markdown, or `None` if other processes have not finished their runs.

    Raises:
        ValueError: If a setting is unknown or wrong, or differs from that of an earlier run, before any training.
        TrainingError: If a run learns nothing. The same grid again repeats it.
    """
    grid = read_grid(settings)
    for run in grid.runs:
        run.check_settings()
    finished = set()
    with tqdm(total=len(grid.runs), desc="Runs") as progress:
        # Twice: what another process was working on may be finished, or interrupted, by then.
        for number, run in [*enumerate(grid.runs)] * 2:
            if number not in finished and (run.read_scores() or _complete(run, grid)):
                finished.add(number)
                progress.update()
    if len(finished) < len(grid.runs):
        return None
    logger.info(f"Writing results.md, results.csv and results.svg to {grid.output}.")
    return write_results(grid)


def _complete(run: Run, grid: Grid) -> bool:
    """Train and evaluate a run, or what is left of it. Returns `False` if another process does."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(run.directory))
        except CheckpointError:
            return False
        if run.read_scores():  # another process has just finished it
            return True
        logger.info(f"Training {run.variant} with seed {run.seed}.")
        run.directory.mkdir(parents=True, exist_ok=True)
        write_file(run.settings_file, json.dumps(run.settings, indent=2))
        model = run.directory / "model"
        # Written after the weights.
        if not (model / "all_results.json").exists():
            train(run.recipe)
        scores = {}
        for name, questions in grid.questions.items():
            # Of the trainer, or of another evaluation: `evaluate` measures how much memory is free.
            clear_device_cache(garbage_collection=True)
            output = run.directory / "evaluation" / name
            measured = evaluate(questions, model, output, grid.metrics, **grid.generation)["metrics"]
            scores[name] = {metric: result["score"] for metric, result in measured.items()}
        write_file(run.scores_file, json.dumps({"evaluation": run.evaluation, "scores": scores}, indent=2))
        return True


__all__ = ["ablate"]
