# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""python -m benchmarks.plot RESULTS.json PICTURE.svg"""

import json
from pathlib import Path
from typing import Annotated

import matplotlib as mpl
import typer
from matplotlib.figure import Figure


# Of the baselines that most rows have. The others are in the table.
COLORS = {"original": "#2a78d6", "peer": "#e0862b", "limit": "#6b6b6b", "one by one": "#2e8b57"}
TICKS = (0.05, 0.2, 0.5, 1, 2, 5, 20, 50)


def plot(
    results: Annotated[Path, typer.Argument(help="What `python -m benchmarks --json` wrote.", exists=True)],
    picture: Annotated[Path, typer.Argument(help="Where to write the picture, such as an SVG.")],
) -> None:
    """Draw how many times as fast ours is as each baseline."""
    result = json.loads(results.read_text(encoding="utf-8"))
    rows = [row for row in result["rows"] if row["baseline"] in COLORS]
    names = list(dict.fromkeys(row["name"] for row in rows))
    figure = Figure(figsize=(8, 1.2 + 0.3 * len(names)), layout="constrained")
    axes = figure.subplots()
    for i, (baseline, color) in enumerate(COLORS.items()):
        found = [row for row in rows if row["baseline"] == baseline]
        ratios = [row["ratio"] for row in found]
        spread = [
            [row["ratio"] - row["spread"][0] for row in found],
            [row["spread"][1] - row["ratio"] for row in found],
        ]
        heights = [names.index(row["name"]) + 0.15 * (i - 1.5) for row in found]
        axes.errorbar(ratios, heights, xerr=spread, fmt="o", markersize=5, color=color, label=baseline)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xticks(TICKS, [f"{tick:g}x" for tick in TICKS])
    axes.minorticks_off()
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    machine = result["machine"]
    device = machine["cpu"] if machine["device"] == "cpu" else machine["device"]
    axes.set_xlabel(f"times as fast as the baseline ({device}, {machine['dtype']}); lines: all rounds")
    figure.legend(loc="outside upper center", ncols=len(COLORS))
    # Text as text; and the same names and no date, so that the same results give the same file.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "benchmarks"}):
        figure.savefig(picture, metadata={"Date": None} if picture.suffix == ".svg" else None)


if __name__ == "__main__":
    typer.run(plot)
