# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Pictures of coloured shapes, and questions that only somebody who sees them can answer."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from PIL import Image, ImageDraw
from tqdm import tqdm


IMAGE_SIZE = 64
# What quickstart.py learns from, and new_question.py draws none of.
NUM_PICTURES = 8000
COLOURS = {
    "red": (225, 40, 40),
    "green": (40, 165, 60),
    "blue": (45, 85, 225),
    "yellow": (245, 215, 40),
    "purple": (150, 50, 190),
    "orange": (250, 135, 20),
}
KINDS = ("circle", "square", "triangle", "cross")


@dataclass(frozen=True)
class Shape:
    """One shape. Its centre and its radius are shares of the picture's side, so that any size can be drawn."""

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
    """One or two shapes, in reading order and of different kinds and colours, on a grey background."""

    shapes: tuple[Shape, ...]
    background: int


@dataclass(frozen=True)
class Question:
    """A question about a scene and its only right answer."""

    text: str
    answer: str


def random_scene(rng: Random) -> Scene:
    """Put one or two shapes into the quarters of a picture: two of them beside or above one another."""
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
    reach = 0.24 - radius
    x, y = (0.25 + 0.5 * quarter + rng.uniform(-reach, reach) for quarter in (column, row))
    return Shape(kind, colour, row, column, centre=(x, y), radius=radius)


def draw(scene: Scene) -> Image.Image:
    """Draw a scene as a square picture of `IMAGE_SIZE` pixels, with smooth edges."""
    fine_size = 4 * IMAGE_SIZE
    picture = Image.new("RGB", (fine_size, fine_size), (scene.background,) * 3)
    pen = ImageDraw.Draw(picture)
    for shape in scene.shapes:
        outline = [(x * fine_size, y * fine_size) for x, y in _outline(shape)]
        pen.polygon(outline, fill=COLOURS[shape.colour])
    return picture.reduce(4)


def _outline(shape: Shape) -> list[tuple[float, float]]:
    """Corners of a shape. A circle is a polygon of very many."""
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
    """The whole scene: every shape, its colour, and how two of them stand to one another."""
    names = [f"a {shape.name}" if shape.colour != "orange" else f"an {shape.name}" for shape in scene.shapes]
    if len(names) == 2:
        first, second = scene.shapes
        relation = "left of" if first.row == second.row else "above"
        names = [f"{names[0]} {relation} {names[1]}"]
    return Question("What is shown in the image?", names[0].capitalize() + ".")


def list_colours(scene: Scene) -> Question:
    """The colours alone, in reading order. There are 36 answers, and the commonest is right one time in 18."""
    colours = " and ".join(shape.colour for shape in scene.shapes)
    return Question("Which colours are in the image?", colours.capitalize() + ".")


def draw_conversations(
    rng: Random, number: int, ask: Callable[[Scene], Question], purpose: str, seen: set[bytes]
) -> list[dict[str, Any]]:
    """
    Draw pictures, and ask about each.

    Args:
        rng (`Random`): Where the scenes come from.
        number (`int`): Of pictures.
        ask (`Callable`): Makes the question about a scene.
        purpose (`str`): What the pictures are for, beside the progress bar and in their ids.
        seen (`set[bytes]`): Pixels of all pictures so far. None of them is drawn again; the new ones are added.

    Returns:
        `list[dict]`: Samples as LLaVA's data sets have them, with the picture itself under `image`.
    """
    conversations: list[dict[str, Any]] = []
    with tqdm(total=number, desc=f"Drawing pictures to {purpose}") as progress:
        while len(conversations) < number:
            scene = random_scene(rng)
            picture = draw(scene)
            if picture.tobytes() in seen:
                continue
            seen.add(picture.tobytes())
            question = ask(scene)
            turns = [
                {"from": "human", "value": f"<image>\n{question.text}"},
                {"from": "gpt", "value": question.answer},
            ]
            name = f"{purpose.replace(' ', '-')}-{len(conversations)}"
            conversations.append({"id": name, "image": picture, "conversations": turns})
            progress.update()
    return conversations
