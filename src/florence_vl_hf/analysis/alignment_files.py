# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Files of `align`: pairs of images and captions that it reads, and the results that it writes."""

import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure


def read_pairs(path: str | Path, image_folder: str | Path | None = None) -> list[dict[str, str]]:
    """
    Read pairs of `image` and `caption`, or of `image` and LLaVA's `conversations`, whose last answer is the caption.

    Args:
        path (`str` or `Path`): A `.json` file with a list, or a `.jsonl` file with one pair per line.
        image_folder (`str` or `Path`, *optional*): Directory of relative image paths. By default, that of the file.

    Raises:
        ValueError: If the file cannot be read, has no pairs, or one of them has no image or no caption.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        is_lines = path.suffix == ".jsonl"
        pairs = [json.loads(line) for line in text.split("\n") if line.strip()] if is_lines else json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(pairs, list) or not pairs:
        raise ValueError(f"{path} has no list of pairs; give a list of objects with `image` and `caption`.")
    folder = Path(path.parent if image_folder is None else image_folder)
    return [_read_pair(pair, f"Pair {number} of {path}", folder) for number, pair in enumerate(pairs, start=1)]


def _read_pair(pair: Any, name: str, folder: Path) -> dict[str, str]:
    match pair:
        case {"image": str(image), "caption": str(caption)}:
            pass
        case {"image": str(image), "conversations": [*_, {"from": "gpt", "value": str(caption)}]}:
            pass
        case _:
            raise ValueError(f"{name} is not an object with `image`, a path, and `caption`, a text.")
    if not image or not caption.strip():
        raise ValueError(f"{name} has an empty {'caption' if image else 'image'}; remove the pair.")
    return {"image": str(folder / image), "caption": caption}


def write_alignment(alignment: dict[str, Any], directory: Path) -> None:
    """Write `alignment.json`, a table `alignment.md`, and the curves of the held-out part, `curves.png`."""
    (directory / "alignment.json").write_text(json.dumps(alignment, indent=1) + "\n", encoding="utf-8")
    (directory / "alignment.md").write_text(format_table(alignment), encoding="utf-8")
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    axes.set_prop_cycle(color=matplotlib.color_sequences["tab20"])
    for result in sorted(alignment["results"], key=lambda result: result["loss"], reverse=True):
        axes.plot(result["curve"], label=result["features"], linewidth=1.2)
    axes.axhline(alignment["constant"], color="black", linestyle=":", label="without features")
    axes.set(xlabel="step", ylabel="1 - cosine of the held-out pairs")
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(directory / "curves.png", dpi=120)


def format_table(alignment: dict[str, Any]) -> str:
    """Format results as a table in Markdown, the best first."""
    settings = alignment["settings"]
    chance = settings["num_neighbors"] / (settings["num_images"] - 1)
    lines = [
        f"| features | channels | 1 - cosine | at step | at the end | mutual {settings['num_neighbors']}-NN | "
        f"linear CKA | CKA, shuffled |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in sorted(alignment["results"], key=lambda result: result["loss"]):
        lines.append(
            f"| {result['features']} | {result['num_channels']} | {result['loss']:.4f} ± "
            f"{result['standard_error']:.4f} | {result['best_step']} | {result['final_loss']:.4f} | "
            f"{result['mutual_knn']:.3f} | {result['linear_cka']:.3f} | {result['linear_cka_shuffled']:.3f} |"
        )
    lines.append(f"| without features | 0 | {alignment['constant']:.4f} | 0 | | {chance:.3f} | | |")
    return "\n".join(lines) + "\n"


__all__ = ["format_table", "read_pairs", "write_alignment"]
