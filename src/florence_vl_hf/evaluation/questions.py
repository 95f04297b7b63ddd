# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Questions to a model: the last one of each sample in a file, or one about each image in a directory."""

from pathlib import Path
from typing import Any

import datasets

from ..processing.images import find_images
from ..training import load_conversations
from ..training.data_loading import EVALUATION_FEATURES
from ..training.samples import IMAGE_ITEM, open_image, read_sample, with_images


def load_questions(
    path: str | Path,
    image_folder: str | Path | None = None,
    split: str = "train",
    question: str | None = None,
) -> datasets.Dataset:
    """
    Load samples to answer.

    Args:
        path (`str` or `Path`): A file or dataset of `load_conversations`; with `question`, a directory of images.
        image_folder (`str` or `Path`, *optional*): As in `load_conversations`.
        split (`str`, *optional*, defaults to `"train"`): As in `load_conversations`.
        question (`str`, *optional*): Asked about each image in the directory and its subdirectories.

    Returns:
        `datasets.Dataset`: Samples of `load_conversations(..., for_evaluation=True)`.

    Raises:
        ValueError: If there is nothing to answer.
    """
    if question is None:
        return load_conversations(path, image_folder, split, for_evaluation=True)
    if not Path(path).is_dir():
        raise ValueError(f"{path} is not a directory; a question is asked about each image of a directory.")
    images = find_images(Path(path))
    if not images:
        raise ValueError(f"{path} has no images; give a directory of images, or a file of samples without a question.")
    messages = [{"role": "user", "content": [IMAGE_ITEM, {"type": "text", "text": question}]}]
    common = {"messages": messages, "length": 0, "answers": [], "problem": None, "problem_message": None}
    samples = [{**common, "id": str(file.relative_to(path)), "images": [str(file)]} for file in images]
    return datasets.Dataset.from_list(samples, features=EVALUATION_FEATURES)


def read_question(sample: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """
    Split a sample into the messages up to its last question, without images, and the answers expected to it.

    Reference answers are the sample's `answers`, else the last answer of the assistant, if it has one.

    Raises:
        SampleError: If the sample cannot be parsed.
    """
    messages, _ = read_sample(sample)
    references = list(sample["answers"])
    if messages[-1]["role"] == "assistant":
        *messages, answer = messages
        text = message_text(answer).strip()
        references = references or ([text] if text else [])
    return messages, references


def open_question(sample: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the messages up to the last question of a sample, with their images, or raise a `SampleError`."""
    images = read_sample(sample).images
    return with_images(read_question(sample)[0], [open_image(image) for image in images])


def message_text(message: dict[str, Any]) -> str:
    """Return the text of a message, without its images."""
    return "".join(item["text"] for item in message["content"] if item["type"] == "text")


__all__ = ["load_questions", "message_text", "open_question", "read_question"]
