# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Samples to train on: LLaVA's format and the chat format are parsed into one type, and their images opened."""

import os
from enum import StrEnum
from io import BytesIO
from typing import Any, NamedTuple, TypedDict

from PIL import Image
from transformers.image_utils import load_image

from ..conversion.original_processor import LLAVA_ROLES
from ..processing import IMAGE_TOKEN


ROLES = tuple(LLAVA_ROLES.values())
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


class SampleError(ValueError):
    """Raised for a sample that cannot be trained on. The message says which, what is wrong, and what to do."""

    def __init__(self, reason: str, problem: Problem = Problem.MALFORMED, sample_id: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.problem = problem
        self.sample_id = sample_id

    def __str__(self) -> str:
        return self.reason if self.sample_id is None else f"Sample {self.sample_id!r}: {self.reason}"


class Message(TypedDict):
    """A message as chat templates read it, with image tokens as items of their own."""

    role: str
    content: list[dict[str, Any]]


class Sample(NamedTuple):
    """A conversation with roles and image tokens checked, and one unopened image per image item."""

    messages: list[Message]
    images: list[Any]


def to_messages(sample: dict[str, Any]) -> list[dict[str, Any]]:
    """
    Convert a sample to messages for `FlorenceVLProcessor.apply_chat_template`, and open its images.

    Args:
        sample (`dict`): From `load_conversations`; or any `dict` with `messages` and `images`, or with LLaVA's keys.
            An image is a path, a `PIL.Image.Image`, or an undecoded image of `datasets` (`{"bytes", "path"}`).

    Returns:
        `list[dict]`: Messages whose image items hold the images: `{"type": "image", "image": PIL.Image.Image}`.

    Raises:
        SampleError: If anything is wrong with the sample.
    """
    try:
        read = read_sample(sample)
        images = iter([open_image(image) for image in read.images])
    except SampleError as error:
        error.sample_id = sample_id(sample)
        raise
    return [
        {
            "role": message["role"],
            "content": [
                {"type": "image", "image": next(images)} if item["type"] == "image" else item
                for item in message["content"]
            ],
        }
        for message in read.messages
    ]


def read_sample(sample: dict[str, Any]) -> Sample:
    """Return a sample that `load_conversations` parsed, or parse one that does not come from there."""
    if "problem_message" not in sample:
        return parse_sample(sample)
    if sample["problem"] is not None:
        raise SampleError(sample["problem_message"], Problem(sample["problem"]))
    return Sample(sample["messages"], _parse_images(sample))


def parse_sample(raw: Any, num_images: int | None = None) -> Sample:
    """Parse and check a sample in LLaVA's or chat format. `num_images` counts images that `raw` does not hold."""
    if not isinstance(raw, dict):
        raise SampleError(f"Got {_shorten(raw)}, expected an object with `conversations` or `messages`.")
    images = _parse_images(raw) if num_images is None else []
    num_images = len(images) if num_images is None else num_images
    is_llava = raw.get("messages") is None
    turns = raw.get("conversations") if is_llava else raw["messages"]
    if not isinstance(turns, list) or not turns:
        raise SampleError(f"Got {_shorten(turns)}, expected a list of turns in `conversations` or `messages`.")
    messages = _parse_llava(turns) if is_llava else _parse_chat(turns, num_images)
    _check_roles([message["role"] for message in messages])
    _check_image_tokens(messages, num_images)
    return Sample(messages, images)


def sample_id(raw: Any) -> str | None:
    """Return the id of a sample in any format, to name it in messages."""
    value = raw.get("id") if isinstance(raw, dict) else None
    return to_utf8(str(value)) if isinstance(value, str | int) and value != "" else None


def open_image(image: Any) -> Image.Image:
    """
    Read an image completely, and close its file.

    The image is rotated upright and converted to RGB as the processor does it for a path: transparency is dropped, as
    in the original. (For a `PIL.Image.Image` with transparency, the processor's pixels differ between releases.)

    Raises:
        SampleError: If there is no such file, or it is not an image, is truncated, or is far too large.
    """
    name = "the image"
    if isinstance(image, dict):
        name = repr(image.get("path") or name)
        image = image["path"] if image.get("bytes") is None else BytesIO(image["bytes"])
    if isinstance(image, str | os.PathLike):
        name = repr(os.fspath(image))
        if not os.path.isfile(image):
            raise SampleError(f"There is no image {name}; add it, or set the image folder.", Problem.MISSING_IMAGE)
    try:
        if isinstance(image, Image.Image):
            return load_image(image)
        with Image.open(image) as opened:
            return load_image(opened)
    except Exception as error:
        # Pillow's decoders raise many types for damaged files, and for what may be a decompression bomb.
        reason = f"Cannot read {name} ({' '.join(str(error).split())}); replace it, or remove the sample."
        raise SampleError(reason, Problem.BROKEN_IMAGE) from error


def to_utf8(text: str) -> str:
    """Replace lone surrogates, which JSON can hold and UTF-8 cannot."""
    return text if text.isascii() else text.encode("utf-8", errors="replace").decode("utf-8")


def _parse_llava(turns: list[Any]) -> list[Message]:
    messages = []
    for turn in turns:
        match turn:
            case {"from": str(role), "value": str(text)} if role in LLAVA_ROLES:
                messages.append(_parse_message(LLAVA_ROLES[role], text))
            case _:
                expected = f"`from` ({', '.join(LLAVA_ROLES)}) and `value` (text)"
                raise SampleError(f"Got the turn {_shorten(turn)}, expected {expected}.")
    return messages


def _parse_chat(turns: list[Any], num_images: int) -> list[Message]:
    messages = []
    for turn in turns:
        match turn:
            case {"role": str(role), "content": str() | list() as content} if role in ROLES:
                messages.append(_parse_message(role, content))
            case _:
                expected = f"`role` ({', '.join(ROLES)}) and `content` (text or a list of items)"
                raise SampleError(f"Got the turn {_shorten(turn)}, expected {expected}.")
    # TRL's datasets have text without image tokens: all images come first in the first user message.
    user = next((message for message in messages if message["role"] == "user"), None)
    has_images = any(item["type"] == "image" for message in messages for item in message["content"])
    if user is not None and not has_images and all(isinstance(turn["content"], str) for turn in turns):
        user["content"] = [IMAGE_ITEM] * num_images + user["content"]
    return messages


def _parse_message(role: str, content: str | list[Any]) -> Message:
    items: list[dict[str, Any]] = []
    for item in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        match item:
            case {"type": "image"}:
                items.append(IMAGE_ITEM)
            case {"type": "text", "text": str(text)}:
                # Only user messages may have images: elsewhere, `_check_image_tokens` refuses the token in the text.
                for index, piece in enumerate(to_utf8(text).split(IMAGE_TOKEN) if role == "user" else [to_utf8(text)]):
                    items += [IMAGE_ITEM] * (index > 0) + [{"type": "text", "text": piece}] * (piece != "")
            case _:
                raise SampleError(f"Got {_shorten(item)} in a message, expected items of type `text` or `image`.")
    return {"role": role, "content": items or [{"type": "text", "text": ""}]}


def _parse_images(raw: dict[str, Any]) -> list[Any]:
    value = raw.get("images") if raw.get("images") is not None else raw.get("image")
    images = value if isinstance(value, list) else [] if value is None or value == "" else [value]
    for image in images:
        is_undecoded = isinstance(image, dict) and not (image.get("bytes") is None and image.get("path") is None)
        if not is_undecoded and (not isinstance(image, str | os.PathLike | Image.Image) or image == ""):
            raise SampleError(f"Got {_shorten(image)} as an image, expected a path such as 'folder/name.jpg'.")
    return images


def _check_roles(roles: list[str]) -> None:
    turns = roles[1:] if roles[0] == "system" else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        expected = "user and assistant in turn, ending with assistant, after at most one system message"
        raise SampleError(f"Got the roles {', '.join(roles)}; expected {expected}.", Problem.ROLE_ORDER)


def _check_image_tokens(messages: list[Message], num_images: int) -> None:
    reason, num_tokens = None, 0
    for message in messages:
        texts = [item["text"] for item in message["content"]]
        num_tokens += texts.count(None)
        # Chat templates join the text: "<im<image>age>" leaves a second token.
        has_token = IMAGE_TOKEN in "".join(filter(None, texts))
        if message["role"] != "user" and (has_token or None in texts):
            reason = f"Got an image or {IMAGE_TOKEN!r} in a message of {message['role']}; move it to a user message."
        elif has_token:
            reason = f"The parts of a message form another {IMAGE_TOKEN!r} where they are joined; remove them."
    if reason is None and num_tokens != num_images:
        reason = f"Got {num_images} images but {num_tokens} image tokens; add one {IMAGE_TOKEN!r} per image."
    if reason is not None:
        raise SampleError(reason, Problem.IMAGE_TOKENS)


def _shorten(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


__all__ = ["Problem", "Sample", "SampleError", "open_image", "parse_sample", "read_sample", "to_messages"]
