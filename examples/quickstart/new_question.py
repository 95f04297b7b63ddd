# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""A new question for the model of quickstart.py: its data set, and what finetuning with LoRA did to the answers."""

import json
from pathlib import Path
from random import Random
from typing import Annotated, Any

import typer
from shapes import NUM_PICTURES, describe, draw_conversations, list_colours


MOST_BEFORE = 0.20
LEAST_AFTER = 0.80
# Of the answers to the old question, how many may be lost.
MOST_LOST = 0.05

app = typer.Typer(add_completion=False)


@app.command()
def draw(
    output: Annotated[Path, typer.Option(help="Folder for the data set.")] = Path("quickstart-question"),
    seed: Annotated[int, typer.Option(help="As quickstart.py had it.")] = 0,
    pictures: Annotated[int, typer.Option(help="As quickstart.py had it.")] = NUM_PICTURES,
    new: Annotated[int, typer.Option(help="How many pictures to learn the new question from.")] = 2000,
    old: Annotated[
        int, typer.Option(help="How many with the old question to mix in. Without any, it is forgotten at once.")
    ] = 1000,
    held_out: Annotated[int, typer.Option(help="How many to ask each question about.")] = 300,
) -> None:
    """Draw pictures that the model never saw, and write them and their questions as a data set of LLaVA's form."""
    rng, seen = Random(seed), set()
    draw_conversations(rng, pictures, describe, "leave out", seen)
    learnt = draw_conversations(rng, new, list_colours, "learn the new question", seen)
    learnt += draw_conversations(rng, old, describe, "keep the old one", seen)
    rng.shuffle(learnt)
    write(output, "train", learnt)
    write(output, "eval", draw_conversations(rng, held_out, list_colours, "be asked the new one", seen))
    write(output, "eval_describe", draw_conversations(rng, held_out, describe, "be asked the old one", seen))


def write(folder: Path, name: str, samples: list[dict[str, Any]]) -> None:
    """Write samples as `name.json`, and their pictures into `images/`."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for sample in samples:
        path = f"images/{sample['id']}.png"
        sample["image"].save(folder / path)
        rows.append({**sample, "image": path})
    (folder / f"{name}.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")


@app.command()
def compare(
    trained: Annotated[Path, typer.Argument(help="`output_dir` of the finetuning.")] = Path("quickstart-lora"),
) -> None:
    """Tell how many answers were right before and after training. The status is 1 if not as many as expected."""
    history = json.loads((trained / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    new_before, new_after = first_and_last(history, "eval_colours_exact_match")
    old_before, old_after = first_and_last(history, "eval_describe_exact_match")
    typer.echo(f"New question: {new_before:.1%} right before, {new_after:.1%} after.")
    typer.echo(f"Old question: {old_before:.1%} right before, {old_after:.1%} after.")
    if new_before > MOST_BEFORE or new_after < LEAST_AFTER or old_before - old_after > MOST_LOST:
        raise SystemExit(
            f"Expected of the new question at most {MOST_BEFORE:.0%} before and at least {LEAST_AFTER:.0%} after, and "
            f"of the old one at most {MOST_LOST:.0%} less: try another --seed, or more pictures."
        )


def first_and_last(history: list[dict[str, float]], name: str) -> tuple[float, float]:
    """A measurement before the first step, and after the last."""
    measured = [entry[name] for entry in history if name in entry]
    return measured[0], measured[-1]


if __name__ == "__main__":
    app()
