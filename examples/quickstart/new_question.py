# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Teach the model of quickstart.py a new question: draw a dataset, and compare the accuracy before and after LoRA."""

import json
from pathlib import Path
from random import Random
from typing import Annotated, Any

import typer
from shapes import NUM_IMAGES, describe, draw_samples, list_colours


# Accuracy on the new question, and how much accuracy on the old question may drop.
MAX_BEFORE = 0.20
MIN_AFTER = 0.80
MAX_DROP = 0.05

app = typer.Typer(add_completion=False)


@app.command()
def draw(
    output: Annotated[Path, typer.Option(help="Output directory of the dataset.")] = Path("quickstart-question"),
    seed: Annotated[int, typer.Option(help="The seed given to quickstart.py.")] = 0,
    num_images: Annotated[int, typer.Option(help="The number of images given to quickstart.py.")] = NUM_IMAGES,
    new: Annotated[int, typer.Option(help="Number of training samples with the new question.")] = 2000,
    old: Annotated[
        int,
        typer.Option(help="Number of training samples with the old question. Without them, the model forgets it."),
    ] = 1000,
    held_out: Annotated[int, typer.Option(help="Number of evaluation samples per question.")] = 300,
) -> None:
    """Draw images that quickstart.py did not train on, and write a dataset in LLaVA's format."""
    rng, used = Random(seed), set()
    draw_samples(rng, num_images, describe, "exclusion", used)
    training = draw_samples(rng, new, list_colours, "training on the new question", used)
    training += draw_samples(rng, old, describe, "training on the old question", used)
    rng.shuffle(training)
    write(output, "train", training)
    write(output, "eval", draw_samples(rng, held_out, list_colours, "evaluating the new question", used))
    write(output, "eval_describe", draw_samples(rng, held_out, describe, "evaluating the old question", used))


def write(directory: Path, name: str, samples: list[dict[str, Any]]) -> None:
    """Write samples to `name.json`, and their images to `images/`."""
    (directory / "images").mkdir(parents=True, exist_ok=True)
    written = []
    for sample in samples:
        path = f"images/{sample['id']}.png"
        sample["image"].save(directory / path)
        written.append({**sample, "image": path})
    (directory / f"{name}.json").write_text(json.dumps(written, indent=1), encoding="utf-8")


@app.command()
def compare(
    trained: Annotated[Path, typer.Argument(help="`output_dir` of the finetuning run.")] = Path("quickstart-lora"),
) -> None:
    """Print the accuracy before and after training. Exits with status 1 if it is not as expected."""
    history = json.loads((trained / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    new_before, new_after = first_and_last(history, "eval_colours_exact_match")
    old_before, old_after = first_and_last(history, "eval_describe_exact_match")
    typer.echo(f"New question: {new_before:.1%} correct before training, {new_after:.1%} after.")
    typer.echo(f"Old question: {old_before:.1%} correct before training, {old_after:.1%} after.")
    if new_before > MAX_BEFORE or new_after < MIN_AFTER or old_before - old_after > MAX_DROP:
        raise SystemExit(
            f"Expected at most {MAX_BEFORE:.0%} before and at least {MIN_AFTER:.0%} after for the new question, and a "
            f"drop of at most {MAX_DROP:.0%} for the old one. Try another --seed, or more images."
        )


def first_and_last(history: list[dict[str, float]], name: str) -> tuple[float, float]:
    """Return the first and the last logged value of a metric."""
    values = [entry[name] for entry in history if name in entry]
    return values[0], values[-1]


if __name__ == "__main__":
    app()
