# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Results of a grid: a table in Markdown and CSV, and a plot."""

import csv
import io
from contextlib import suppress
from importlib.util import find_spec
from statistics import fmean, stdev


if find_spec("matplotlib") is None:
    raise ModuleNotFoundError("Ablations require matplotlib; run `pip install 'florence_vl_hf[analysis]'`.")

import matplotlib as mpl
from matplotlib.figure import Figure

from ..conversion.checkpoint_files import CheckpointError, locked, write_file
from .ablation_grid import Grid


MEAN_COLOR, SEED_COLOR = "#2a78d6", "#9a9a9a"

# Of each variant, by evaluation set and metric: the scores with all seeds, from 0 to 1.
Results = dict[str, dict[tuple[str, str], list[float]]]


def write_results(grid: Grid) -> str:
    """Write `results.md`, `results.csv` and `results.svg` of a finished grid, and return the table in Markdown."""
    results: Results = {variant: {} for variant in grid.configs}
    for run in grid.runs:
        for name, scores in (run.read_scores() or {}).items():
            for metric, score in scores.items():
                results[run.variant].setdefault((name, metric), []).append(score)
    num_tokens = {variant: config.num_image_tokens for variant, config in grid.configs.items()}
    seeds = list(dict.fromkeys(run.seed for run in grid.runs))
    markdown = format_markdown(results, num_tokens, seeds)
    # Another process that finishes at the same time writes the same.
    with suppress(CheckpointError), locked(grid.output / "results.md"):
        write_file(grid.output / "results.csv", format_csv(results, num_tokens, seeds))
        write_file(grid.output / "results.svg", plot(results))
        write_file(grid.output / "results.md", markdown)
    return markdown


def spread(scores: list[float]) -> float:
    """Return the standard deviation of a sample; not a number for a single score."""
    return stdev(scores) if len(scores) > 1 else float("nan")


def format_markdown(results: Results, num_tokens: dict[str, int], seeds: list[int]) -> str:
    """Format results in percent, with a column for each evaluation set and metric."""
    columns = list(next(iter(results.values())))
    lines = [["variant", "image tokens", *(f"{name} ({metric})" for name, metric in columns)]]
    lines.append(["---", *["---:"] * (1 + len(columns))])
    for variant, cells in results.items():
        texts = [f"{100 * fmean(scores):.1f} ± {100 * spread(scores):.1f}" for scores in cells.values()]
        lines.append([variant, str(num_tokens[variant]), *(text.removesuffix(" ± nan") for text in texts)])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    note = "mean ± standard deviation over the seeds" if len(seeds) > 1 else "with the seed"
    return f"{table}\n\nIn percent: {note} {', '.join(map(str, seeds))}.\n"


def format_csv(results: Results, num_tokens: dict[str, int], seeds: list[int]) -> str:
    """Format results with a line for each variant, evaluation set and metric, and a column for each seed."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    seed_columns = [f"seed {seed}" for seed in seeds]
    writer.writerow(["variant", "image_tokens", "set", "metric", "mean", "standard_deviation", *seed_columns])
    for variant, cells in results.items():
        for (name, metric), scores in cells.items():
            deviation = spread(scores) if len(seeds) > 1 else ""
            writer.writerow([variant, num_tokens[variant], name, metric, fmean(scores), deviation, *scores])
    return file.getvalue()


def plot(results: Results) -> str:
    """Plot mean, standard deviation and all scores of each variant, with a column as in the table. Returns an SVG."""
    columns = list(next(iter(results.values())))
    figure = Figure(figsize=(1.5 + 2.5 * len(columns), 1.2 + 0.3 * len(results)), layout="constrained")
    all_axes = figure.subplots(1, len(columns), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (name, metric) in zip(all_axes, columns, strict=True):
        for y, cells in enumerate(results.values()):
            percent = [100 * score for score in cells[name, metric]]
            axes.plot(percent, [y] * len(percent), "|", color=SEED_COLOR, markersize=9)
            axes.errorbar(fmean(percent), y, xerr=spread(percent), fmt="o", capsize=3, color=MEAN_COLOR)
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


__all__ = ["write_results"]
