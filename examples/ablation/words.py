# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Draw the dataset of grid.yaml, shapes and a word in each image, and save an untrained model per seed."""

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Annotated, Any

import typer
from new_question import write
from quickstart import SYSTEM_MESSAGE, build_config, build_processor, build_tokenizer
from shapes import Question, Scene, draw_samples, list_colours, random_scene
from transformers import set_seed

from florence_vl_hf import FlorenceVLForConditionalGeneration
from florence_vl_hf.conversion.checkpoint_files import output_directory
from florence_vl_hf.modeling.configuration_florence_vl import DEFAULT_PROMPTS


WORDS = ("bar", "bus", "cab", "gym", "ice", "inn", "pub", "spa", "tea", "zoo")


def place_word(rng: Random) -> Scene:
    """Place one or two shapes, and a word in a quarter without a shape."""
    scene = random_scene(rng)
    taken = {(shape.row, shape.column) for shape in scene.shapes}
    free = [(row, column) for row in range(2) for column in range(2) if (row, column) not in taken]
    return replace(scene, word=rng.choice(WORDS), word_place=rng.choice(free))


def ask_place(scene: Scene) -> Question:
    """Ask where the shapes are, in reading order: 8 possible answers."""
    places = [f"{('top', 'bottom')[shape.row]} {('left', 'right')[shape.column]}" for shape in scene.shapes]
    return Question("Where are the shapes?", " and ".join(places).capitalize() + ".")


def ask_word(scene: Scene) -> Question:
    """Ask for the word: 10 possible answers."""
    return Question("Which word is in the image?", scene.word.capitalize() + ".")


QUESTIONS = {"colour": list_colours, "place": ask_place, "word": ask_word}


def main(
    output: Annotated[Path, typer.Option(help="Output directory of the dataset and the models.")] = Path(
        "ablation-data"
    ),
    seed: Annotated[int, typer.Option(help="Seed of the images.")] = 0,
    num_images: Annotated[int, typer.Option(help="Number of training images, each with all three questions.")] = 6000,
    held_out: Annotated[int, typer.Option(help="Number of evaluation images per question.")] = 300,
    num_models: Annotated[int, typer.Option(help="Number of untrained models, with the seeds 0, 1, …")] = 3,
) -> None:
    """Draw training images with three questions each, and evaluation images with one. Save untrained models."""
    with output_directory(output) as directory:
        samples = draw_data(directory, Random(seed), num_images, held_out)
        save_models(directory, samples, num_models)


def draw_data(directory: Path, rng: Random, num_images: int, held_out: int) -> list[dict[str, Any]]:
    """Write a training set with all three questions about each image, and an evaluation set per question."""
    used: set[bytes] = set()

    def ask_all(scene: Scene) -> list[Question]:
        return [ask(scene) for ask in rng.sample(list(QUESTIONS.values()), len(QUESTIONS))]

    training = draw_samples(rng, num_images, ask_all, "training", used, place_word)
    write(directory, "train", training)
    for name, ask in QUESTIONS.items():
        write(directory, name, draw_samples(rng, held_out, ask, name, used, place_word))
    return training


def save_models(directory: Path, samples: list[dict[str, Any]], num_models: int) -> None:
    """Save untrained models of the same configuration, with the seeds 0, 1, …"""
    texts = [turn["value"].removeprefix("<image>\n") for sample in samples for turn in sample["conversations"]]
    tokenizer = build_tokenizer([*texts, *DEFAULT_PROMPTS.values(), SYSTEM_MESSAGE])
    config = build_config(tokenizer)
    processor = build_processor(tokenizer, config.num_image_tokens)
    for number in range(num_models):
        set_seed(number)
        FlorenceVLForConditionalGeneration(config).save_pretrained(directory / f"model-{number}")
        processor.save_pretrained(directory / f"model-{number}")


if __name__ == "__main__":
    typer.run(main)
