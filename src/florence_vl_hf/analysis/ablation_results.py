# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Results of an ablation: a table in Markdown and CSV, and a plot."""

import csv
import io
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import fmean, stdev


if find_spec("matplotlib") is None:
    raise ModuleNotFoundError("Ablations require matplotlib; run `pip install 'florence_vl_hf[analysis]'`.")

import matplotlib as mpl
from matplotlib.figure import Figure

from ..conversion.checkpoint_files import CheckpointError, locked
from ..evaluation.prediction import write_file
from .ablation_grid import Grid, Scores


MEAN_COLOR, SEED_COLOR = "#2a78d6", "#9a9a9a"


@dataclass(frozen=True)
class Result:
    """Scores of a variant, from 0 to 1, one per seed."""

    scores: list[float]

    @property
    def mean(self) -> float:
        return fmean(self.scores)

    @property
    def deviation(self) -> float:
        """The standard deviation of a sample; not a number with a single seed."""
        return stdev(self.scores) if len(self.scores) > 1 else float("nan")


# By variant, then by evaluation set and metric.
Results = dict[str, dict[tuple[str, str], Result]]


def write_results(grid: Grid) -> str:
    """Write `results.md`, `results.csv` and `results.svg` of a finished grid, and return the table in Markdown."""
    results: Results = {}
    for variant in grid.configs:
        runs: list[Scores] = [run.read_scores() or {} for run in grid.runs if run.variant == variant]
        results[variant] = {
            (name, metric): Result([scores[name][metric] for scores in runs])
            for name in grid.questions
            for metric in grid.metrics
        }
    seeds = list(dict.fromkeys(run.seed for run in grid.runs))
    num_tokens = {variant: config.num_image_tokens for variant, config in grid.configs.items()}
    markdown = format_markdown(results, num_tokens, seeds)
    # Another process that finishes at the same time writes the same.
    with suppress(CheckpointError), locked(grid.output / "results.md"):
        write_file(grid.output / "results.csv", format_csv(results, num_tokens, seeds))
        write_file(grid.output / "results.svg", plot(results, len(seeds)))
        write_file(grid.output / "results.md", markdown)
    return markdown


def format_markdown(results: Results, num_tokens: dict[str, int], seeds: list[int]) -> str:
    """Format results as a table, in percent, with a column for each evaluation set and metric."""
    columns = list(next(iter(results.values())))
    lines = [["variant", "image tokens", *(f"{name} ({metric})" for name, metric in columns)]]
    lines.append(["---", *["---:"] * (1 + len(columns))])
    for variant, cells in results.items():
        scores = [f"{100 * cell.mean:.1f} ± {100 * cell.deviation:.1f}" for cell in cells.values()]
        lines.append([variant, str(num_tokens[variant]), *(score.removesuffix(" ± nan") for score in scores)])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    spread = "mean ± standard deviation over the seeds" if len(seeds) > 1 else "with the seed"
    return f"{table}\n\nIn percent: {spread} {', '.join(map(str, seeds))}.\n"


def format_csv(results: Results, num_tokens: dict[str, int], seeds: list[int]) -> str:
    """Format results with a line for each variant, evaluation set and metric, and also the scores of all seeds."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    seed_columns = [f"seed {seed}" for seed in seeds]
    writer.writerow(["variant", "image_tokens", "set", "metric", "mean", "standard_deviation", *seed_columns])
    for variant, cells in results.items():
        for (name, metric), cell in cells.items():
            deviation = cell.deviation if len(seeds) > 1 else ""
            writer.writerow([variant, num_tokens[variant], name, metric, cell.mean, deviation, *cell.scores])
    return file.getvalue()


def plot(results: Results, num_seeds: int) -> str:
    """Plot the mean, the standard deviation and all scores of each variant, as an SVG."""
    columns = list(next(iter(results.values())))
    height = 1.2 + 0.3 * len(results)
    figure = Figure(figsize=(1.5 + 2.5 * len(columns), height), layout="constrained")
    all_axes = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, (name, metric) in zip(all_axes, columns, strict=True):
        cells = [row[name, metric] for row in results.values()]
        for y, cell in enumerate(cells):
            axes.plot([100 * score for score in cell.scores], [y] * num_seeds, "|", color=SEED_COLOR, markersize=9)
        means, deviations = [100 * cell.mean for cell in cells], [100 * cell.deviation for cell in cells]
        axes.errorbar(means, range(len(cells)), xerr=deviations, fmt="o", capsize=3, color=MEAN_COLOR)
        axes.set_title(name)
        axes.set_xlabel(f"{metric} (%)")
        axes.grid(axis="x", alpha=0.3)
    all_axes[0].set_yticks(range(len(results)), list(results))
    all_axes[0].invert_yaxis()
    file = io.StringIO()
    # Text as text; and the same names and no date, so that the same results give the same file.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ablation"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


__all__ = ["Result", "format_csv", "format_markdown", "plot", "write_results"]
