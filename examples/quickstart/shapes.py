# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Images of coloured shapes, and questions about them that cannot be answered without the image."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm


IMAGE_SIZE = 64
# Training images of quickstart.py. new_question.py draws the same ones again, to exclude them from its own.
NUM_IMAGES = 8000
COLOURS = {
    "red": (225, 40, 40),
    "green": (40, 165, 60),
    "blue": (45, 85, 225),
    "yellow": (245, 215, 40),
    "purple": (150, 50, 190),
    "orange": (250, 135, 20),
}
KINDS = ("circle", "square", "triangle", "cross")
# Height of the letters of a word, as a fraction of the image's side length.
FONT_SIZE = 0.28


@dataclass(frozen=True)
class Shape:
    """One shape. `centre` and `radius` are fractions of the image's side length, so a scene has no fixed size."""

    kind: str
    colour: str
    row: int
    column: int
    centre: tuple[float, float]
    radius: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"


@dataclass(frozen=True)
class Scene:
    """
    One or two shapes on a grey background, in reading order, of different kinds and colours.

    `word` is written in the middle of the quarter `word_place`, a row and a column.
    """

    shapes: tuple[Shape, ...]
    background: int
    word: str = ""
    word_place: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Question:
    """A question about a scene, and its only correct answer."""

    text: str
    answer: str


def random_scene(rng: Random) -> Scene:
    """Place one shape in a quarter of the image, or two shapes side by side or one above the other."""
    row, column = rng.randrange(2), rng.randrange(2)
    quarters = rng.choice(([(row, column)], [(row, 0), (row, 1)], [(0, column), (1, column)]))
    kinds, colours = rng.sample(KINDS, len(quarters)), rng.sample(list(COLOURS), len(quarters))
    shapes = tuple(
        _random_shape(rng, kind, colour, *quarter)
        for kind, colour, quarter in zip(kinds, colours, quarters, strict=True)
    )
    return Scene(shapes, background=rng.randint(190, 255))


def _random_shape(rng: Random, kind: str, colour: str, row: int, column: int) -> Shape:
    radius = rng.uniform(0.18, 0.23)
    max_shift = 0.24 - radius
    x, y = (0.25 + 0.5 * quarter + rng.uniform(-max_shift, max_shift) for quarter in (column, row))
    return Shape(kind, colour, row, column, centre=(x, y), radius=radius)


def draw(scene: Scene) -> Image.Image:
    """Draw a scene as an image of `IMAGE_SIZE` x `IMAGE_SIZE` pixels, with antialiased edges."""
    large_size = 4 * IMAGE_SIZE
    image = Image.new("RGB", (large_size, large_size), (scene.background,) * 3)
    canvas = ImageDraw.Draw(image)
    for shape in scene.shapes:
        outline = [(x * large_size, y * large_size) for x, y in _outline(shape)]
        canvas.polygon(outline, fill=COLOURS[shape.colour])
    if scene.word:
        row, column = scene.word_place
        middle = ((0.25 + 0.5 * column) * large_size, (0.25 + 0.5 * row) * large_size)
        font = ImageFont.load_default(FONT_SIZE * large_size)
        canvas.text(middle, scene.word, fill="black", font=font, anchor="mm")
    return image.reduce(4)


def _outline(shape: Shape) -> list[tuple[float, float]]:
    """Compute the corners of a shape. A circle is approximated by a polygon."""
    x, y = shape.centre
    if shape.kind == "cross":
        arm = 0.3
        corners = [(arm, 1), (arm, arm), (1, arm)]
        quarter_turns = [[(a, b), (b, -a), (-a, -b), (-b, a)] for a, b in corners]
        points = [turned[turn] for turn in range(4) for turned in quarter_turns]
    elif shape.kind == "square":
        points = [(0.85 * a, 0.85 * b) for a, b in ((1, 1), (1, -1), (-1, -1), (-1, 1))]
    else:
        num_corners = {"circle": 60, "triangle": 3}[shape.kind]
        angles = [2 * math.pi * i / num_corners for i in range(num_corners)]
        points = [(math.sin(angle), -math.cos(angle)) for angle in angles]
    return [(x + shape.radius * a, y + shape.radius * b) for a, b in points]


def describe(scene: Scene) -> Question:
    """Ask for all shapes, their colours, and the position of the first relative to the second."""
    names = [f"a {shape.name}" if shape.colour != "orange" else f"an {shape.name}" for shape in scene.shapes]
    if len(names) == 2:
        first, second = scene.shapes
        relation = "left of" if first.row == second.row else "above"
        names = [f"{names[0]} {relation} {names[1]}"]
    return Question("What is shown in the image?", names[0].capitalize() + ".")


def list_colours(scene: Scene) -> Question:
    """Ask for the colours only, in reading order: 36 possible answers, the most frequent one for 1 scene in 18."""
    colours = " and ".join(shape.colour for shape in scene.shapes)
    return Question("Which colours are in the image?", colours.capitalize() + ".")


def draw_samples(
    rng: Random,
    num_samples: int,
    ask: Callable[[Scene], Question | list[Question]],
    purpose: str,
    used: set[bytes],
    place: Callable[[Random], Scene] = random_scene,
) -> list[dict[str, Any]]:
    """
    Draw images and write one or several questions and their answers for each.

    Args:
        rng (`Random`): Source of the random scenes.
        num_samples (`int`): Number of samples, each with one image.
        ask (`Callable`): Returns the question, or several, about a scene.
        purpose (`str`): What the samples are for, such as `training`; part of the progress bar and the samples' ids.
        used (`set[bytes]`): Pixels of all images drawn so far. They are not drawn again; new images are added.
        place (`Callable`, *optional*): Returns a random scene.

    Returns:
        `list[dict]`: Samples in LLaVA's format, with the `PIL.Image.Image` itself as `image`.
    """
    samples: list[dict[str, Any]] = []
    with tqdm(total=num_samples, desc=f"Drawing images for {purpose}") as progress:
        while len(samples) < num_samples:
            scene = place(rng)
            image = draw(scene)
            if image.tobytes() in used:
                continue
            used.add(image.tobytes())
            asked = ask(scene)
            turns: list[dict[str, str]] = []
            for question in asked if isinstance(asked, list) else [asked]:
                image_token = "" if turns else "<image>\n"
                turns.append({"from": "human", "value": image_token + question.text})
                turns.append({"from": "gpt", "value": question.answer})
            sample_id = f"{purpose.replace(' ', '-')}-{len(samples)}"
            samples.append({"id": sample_id, "image": image, "conversations": turns})
            progress.update()
    return samples
