# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Samples to train on: LLaVA's format and the chat format are parsed into one type, and their images opened."""

import os
import re
import reprlib
from dataclasses import dataclass
from enum import StrEnum
from io import BytesIO
from typing import Any, NamedTuple

from PIL import Image

from ..conversion.original_processor import LLAVA_ROLES
from ..processing import IMAGE_TOKEN
from ..processing.images import MAX_IMAGE_SIDE, read_pixels
from ..processing.text import to_utf8


ROLES = tuple(LLAVA_ROLES.values())
# In characters, in messages.
MAX_ID_LENGTH = 200
MAX_REASON_LENGTH = 1000
# With `text`, because Arrow gives all items the same keys.
IMAGE_ITEM = {"type": "image", "text": None}


class Problem(StrEnum):
    """What can be wrong with a sample."""

    MALFORMED = "malformed sample"
    ROLE_ORDER = "role order"
    IMAGE_TOKENS = "image tokens"
    OUTSIDE_IMAGE_FOLDER = "image outside of its folder"
    MISSING_IMAGE = "missing image"
    BROKEN_IMAGE = "broken image"
    IMAGES_TOO_LONG = "images longer than max_length"
    NOTHING_TO_LEARN = "nothing to learn"
    TOO_LONG = "longer than max_length"


@dataclass(eq=False)
class SampleError(ValueError):
    """Raised for a sample that cannot be trained on. The message says which, what is wrong, and what to do."""

    reason: str
    problem: Problem = Problem.MALFORMED
    sample_id: str | None = None

    def __post_init__(self) -> None:
        if len(self.reason) > MAX_REASON_LENGTH:
            self.reason = f"{self.reason[:MAX_REASON_LENGTH]}..."

    def __str__(self) -> str:
        return self.reason if self.sample_id is None else f"Sample {self.sample_id!r}: {self.reason}"


class Sample(NamedTuple):
    """Messages for chat templates, with image tokens as items of their own, and one unopened image per image item."""

    messages: list[dict[str, Any]]
    images: list[Any]


def to_messages(sample: dict[str, Any], max_image_side: int = MAX_IMAGE_SIDE) -> list[dict[str, Any]]:
    """
    Convert a sample to messages for `FlorenceVLProcessor.apply_chat_template`, and open its images.

    Args:
        sample (`dict`): From `load_conversations`; or any `dict` with `messages` and `images`, or with LLaVA's keys.
            An image is a path, a `PIL.Image.Image`, or an undecoded image of `datasets` (`{"bytes", "path"}`).
        max_image_side (`int`, *optional*, defaults to 12,000): An image with a longer side, in pixels, is broken.

    Returns:
        `list[dict]`: Messages whose image items hold the images: `{"type": "image", "image": PIL.Image.Image}`.

    Raises:
        SampleError: If anything is wrong with the sample.
    """
    try:
        messages, images = read_sample(sample)
        return with_images(messages, [open_image(image, max_image_side) for image in images])
    except SampleError as error:
        error.sample_id = sample_id(sample)
        raise


def with_images(messages: list[dict[str, Any]], images: list[Image.Image]) -> list[dict[str, Any]]:
    """Put images into the image items of messages, in order."""
    remaining = iter(images)

    def with_image(item: dict[str, Any]) -> dict[str, Any]:
        return {"type": "image", "image": next(remaining)} if item["type"] == "image" else item

    return [{"role": turn["role"], "content": [with_image(item) for item in turn["content"]]} for turn in messages]


def read_sample(sample: dict[str, Any]) -> Sample:
    """Return a sample that `load_conversations` parsed, or parse one that does not come from there."""
    if not (isinstance(sample, dict) and {"problem", "problem_message"} <= sample.keys()):
        return parse_sample(sample)
    if sample["problem"] is not None:
        raise SampleError(sample["problem_message"], Problem(sample["problem"]))
    return Sample(sample["messages"], _list_images(sample))


def require_answer(messages: list[dict[str, Any]]) -> None:
    """Raise a `SampleError` if no answer has any text."""
    answers = [item["text"] for message in messages if message["role"] == "assistant" for item in message["content"]]
    if not any(text.strip() for text in answers):
        raise SampleError("No answer has any text; remove the sample.", Problem.NOTHING_TO_LEARN)


def parse_sample(raw: Any, image_folder: str | None = None, *, for_evaluation: bool = False) -> Sample:
    """
    Parse and check a sample in LLaVA's or chat format. With `image_folder`, all images must be paths in it. A sample
    `for_evaluation` may end with a question.
    """
    match raw:
        case {"messages": [_, *_] as turns} | {"conversations": [_, *_] as turns}:
            messages = [_parse_turn(turn) for turn in turns]
        case _:
            expected = "an object with a list of turns in `messages` or `conversations`"
            raise SampleError(f"Got {_shorten(raw)}, expected {expected}.")
    images = _list_images(raw)
    if image_folder is not None:
        images = [_resolve(image, image_folder) for image in images]

    roles = [message["role"] for message in messages]
    first_user = int(roles[0] == "system")
    if for_evaluation and roles[-1] == "user":
        roles.append("assistant")
    if roles[first_user:] != ["user", "assistant"] * max(1, len(roles) // 2):
        expected = "user and assistant in turn, ending with assistant, after at most one system message"
        raise SampleError(f"Got the roles {', '.join(roles)}; expected {expected}.", Problem.ROLE_ORDER)

    if all(isinstance(turn.get("content"), str) and IMAGE_TOKEN not in turn["content"] for turn in turns):
        # TRL's datasets have text without image tokens: all images come first in the first user message.
        messages[first_user]["content"] = [IMAGE_ITEM] * len(images) + messages[first_user]["content"]
    num_tokens, has_extra = 0, False
    for message in messages:
        texts = [item["text"] for item in message["content"]]
        num_tokens += texts.count(None)
        # Chat templates join the text: "<im<image>age>" leaves a second token.
        has_extra |= IMAGE_TOKEN in "".join(filter(None, texts)) or (message["role"] != "user" and None in texts)
    if has_extra or num_tokens != len(images):
        advice = "to user messages only, and no text that forms another where the parts of a message are joined"
        reason = f"Got {len(images)} images but {num_tokens} image tokens; add one {IMAGE_TOKEN!r} per image"
        raise SampleError(f"{reason}, {advice}.", Problem.IMAGE_TOKENS)
    return Sample(messages, images)


def parse_answers(raw: dict[str, Any]) -> list[str]:
    """Return the reference answers of a sample to evaluate, apart from that of the assistant."""
    match raw.get("answers"):
        case None:
            return []
        case list(answers) if all(isinstance(answer, str) for answer in answers):
            return [to_utf8(answer) for answer in answers]
        case answers:
            raise SampleError(f"Got {_shorten(answers)} in `answers`, expected a list of strings.")


def sample_id(raw: Any) -> str | None:
    """Return the id of a sample in any format, to name it in messages."""
    value = raw.get("id") if isinstance(raw, dict) else None
    if isinstance(value, int) and value.bit_length() > 64:
        return None
    return to_utf8(str(value)[:MAX_ID_LENGTH]) if isinstance(value, str | int) and value != "" else None


def open_image(image: Any, max_side: int = MAX_IMAGE_SIDE) -> Image.Image:
    """
    Read an image with `read_pixels`, and close its file.

    Raises:
        SampleError: If there is no such file, it is not an image, or a side has more than `max_side` pixels.
    """
    content = None
    if isinstance(image, dict):
        image, content = image.get("path"), image.get("bytes")
    name = "in the dataset" if image is None else repr(str(image))
    if content is None and isinstance(image, str | os.PathLike) and not os.path.isfile(image):
        raise SampleError(f"There is no image {name}; add it, or set the image folder.", Problem.MISSING_IMAGE)
    try:
        if isinstance(image, Image.Image):
            return read_pixels(image, max_side)
        with Image.open(image if content is None else BytesIO(content)) as opened:
            return read_pixels(opened, max_side)
    except Exception as error:
        # Pillow's decoders raise many types for damaged files, and for what may be a decompression bomb.
        reason = f"Cannot read the image {name} ({' '.join(str(error).split())}); replace it, or remove the sample."
        raise SampleError(reason, Problem.BROKEN_IMAGE) from error


def _parse_turn(turn: Any) -> dict[str, Any]:
    match turn:
        case {"from": str(name), "value": str(content)} if name in LLAVA_ROLES:
            role = LLAVA_ROLES[name]
        case {"role": str(role), "content": str() | list() as content} if role in ROLES:
            pass
        case _:
            expected = f"`from` ({', '.join(LLAVA_ROLES)}) and `value`, or `role` ({', '.join(ROLES)}) and `content`"
            raise SampleError(f"Got the turn {_shorten(turn)}, expected {expected}.")
    pieces: list[str] = []
    for item in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        match item:
            case {"type": "image"}:
                pieces.append(IMAGE_TOKEN)
            case {"type": "text", "text": str(text)}:
                pieces += re.split(f"({IMAGE_TOKEN})", to_utf8(text))
            case _:
                raise SampleError(f"Got {_shorten(item)} in a message, expected items of type `text` or `image`.")
    items = [IMAGE_ITEM if piece == IMAGE_TOKEN else {"type": "text", "text": piece} for piece in pieces if piece]
    return {"role": role, "content": items or [{"type": "text", "text": ""}]}


def _list_images(sample: dict[str, Any]) -> list[Any]:
    value = sample.get("image") if sample.get("images") is None else sample["images"]
    return value if isinstance(value, list) else [] if value in (None, "") else [value]


def _resolve(image: Any, image_folder: str) -> str:
    if not isinstance(image, str) or image == "":
        raise SampleError(f"Got {_shorten(image)} as an image, expected a path such as 'folder/name.jpg'.")
    path = os.path.normpath(os.path.join(image_folder, image))
    # Symbolic links in the folder are the user's own, and may point anywhere.
    if not path.startswith(os.path.join(image_folder, "")):
        reason = f"The image {image!r} is outside of {image_folder}; use paths in the image folder, or set another."
        raise SampleError(reason, Problem.OUTSIDE_IMAGE_FOLDER)
    return to_utf8(path)


class _Shortened(reprlib.Repr):
    """`repr` in bounded time and depth, also of integers with more digits than Python prints."""

    def repr_int(self, x: int, level: int) -> str:
        return str(x) if x.bit_length() <= 64 else f"an integer of {x.bit_length()} bits"


def _shorten(value: Any) -> str:
    text = "nothing" if value is None else _Shortened().repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


__all__ = ["Problem", "Sample", "SampleError", "open_image", "parse_sample", "read_sample", "to_messages"]
