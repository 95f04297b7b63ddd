# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Loading of conversations, from files or datasets, as one memory-mapped dataset of parsed samples."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets.exceptions import DatasetGenerationError

from .samples import Message, Problem, SampleError, parse_sample, sample_id, to_utf8


# Part of the key in the cache of `datasets`: increase it when the same file is to give other samples.
CACHE_VERSION = 2
# Added to the length of samples with images. Text alone is shorter, so samples without images sort first.
LENGTH_OF_IMAGES = 1 << 20
# An estimate that holds for English and Chinese.
BYTES_PER_TOKEN = 4
SAMPLES_PER_BATCH = 1000
# In characters. A file of JSON is read in blocks, and one sample is held in memory.
BLOCK_SIZE = 1 << 20
MAX_SAMPLE_SIZE = 1 << 26
SEPARATORS = tuple(", \t\r\n")

FEATURES = {
    "id": datasets.Value("string"),
    "messages": datasets.List(
        {
            "role": datasets.Value("string"),
            "content": datasets.List({"type": datasets.Value("string"), "text": datasets.Value("string")}),
        }
    ),
    "images": datasets.List(datasets.Value("string")),
    "problem": datasets.Value("string"),
    "problem_message": datasets.Value("string"),
}


class ConversationFileError(ValueError):
    """Raised for a file or dataset that cannot be read as conversations."""


def load_conversations(
    path: str | Path | datasets.Dataset, image_folder: str | Path | None = None, split: str = "train"
) -> datasets.Dataset:
    """
    Load conversations in LLaVA's or in chat format as one dataset, memory-mapped and cached on disk.

    Args:
        path (`str`, `Path` or `datasets.Dataset`): Samples with LLaVA's keys `conversations`, `id` and `image`, or
            with `messages`, `id` and `images` (the last two are optional): a `.json` file (a list), a `.jsonl` file, a
            dataset, a directory of `save_to_disk`, a `.parquet` file, or a name for `datasets.load_dataset`.
        image_folder (`str` or `Path`, *optional*): The directory that image paths are relative to. By default, `path`
            if it is a directory, else the directory that contains it.
        split (`str`, *optional*, defaults to `"train"`): The split of a dataset. JSON files have none.

    Returns:
        `datasets.Dataset`: The columns `id`, `messages` (as in `Sample`), `images` (paths, or a dataset's own
        undecoded images in its column `images` or `image`), and `problem` (a `Problem`) and `problem_message`, `None`
        for valid samples. Invalid samples stay in the dataset; `to_messages` raises their `SampleError`.

    Raises:
        ConversationFileError: If there is no such file, or it is not a list, is truncated, or has no samples.
    """
    if isinstance(path, datasets.Dataset):
        return _load_dataset(path, os.path.abspath(image_folder or "."))
    path = Path(path)
    image_folder = os.path.abspath(image_folder or (path if path.is_dir() else path.parent))
    if path.suffix.lower() in (".json", ".jsonl", ".parquet") and not path.is_file():
        raise ConversationFileError(f"There is no file {path}; expected a file of conversations.")
    if path.suffix.lower() not in (".json", ".jsonl"):
        return _load_dataset(_find_dataset(path, split), image_folder)
    key = {"size": path.stat().st_size, "modified": path.stat().st_mtime_ns}
    return _generate(_samples_of_file, {"path": str(path.resolve()), "image_folder": image_folder, **key}, FEATURES)


def with_lengths(dataset: datasets.Dataset, tokens_per_image: int = 577) -> datasets.Dataset:
    """
    Add the column `length`, which the Trainer's `train_sampling_strategy="group_by_length"` sorts by.

    Lengths are estimated, without a tokenizer. All samples with images are longer than those without: most batches
    then hold one kind, as in the original, which groups by modality first. (This makes the column unfit for
    `batch_rebalance`, which balances sums of lengths.)

    Args:
        dataset (`datasets.Dataset`): A dataset of `load_conversations`.
        tokens_per_image (`int`, *optional*, defaults to 577): `num_image_tokens` of the model's configuration.
    """
    lengths = dataset.select_columns("messages").map(
        _estimate_length,
        fn_kwargs={"tokens_per_image": tokens_per_image},
        remove_columns="messages",
        features=datasets.Features({"length": datasets.Value("int64")}),
        desc="Lengths",
    )
    others = dataset.remove_columns([name for name in dataset.column_names if name == "length"])
    return datasets.concatenate_datasets([others, lengths], axis=1)


def _estimate_length(sample: dict[str, Any], tokens_per_image: int) -> dict[str, int]:
    items = [item for message in sample["messages"] for item in message["content"]]
    num_images = sum(item["type"] == "image" for item in items)
    length = sum(len((item["text"] or "").encode()) for item in items) // BYTES_PER_TOKEN
    if num_images:
        return {"length": LENGTH_OF_IMAGES + length + num_images * tokens_per_image}
    return {"length": min(length, LENGTH_OF_IMAGES - 1)}


def _generate(
    samples: Callable[..., Iterator[dict[str, Any]]], arguments: dict[str, Any], features: dict[str, Any]
) -> datasets.Dataset:
    """Write samples to the cache of `datasets`, unless it has samples of the same arguments."""
    try:
        return datasets.Dataset.from_generator(
            samples, features=datasets.Features(features), gen_kwargs={**arguments, "version": CACHE_VERSION}
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ConversationFileError):
            raise error.__cause__ from None
        raise


def _store(raw: Any, number: int, image_folder: str, num_images: int | None = None) -> dict[str, Any]:
    """Parse a sample, or take the `SampleError` of one that is not JSON, and return its columns."""
    messages: list[Message] = []
    images: list[str] = []
    problem = problem_message = None
    try:
        if isinstance(raw, SampleError):
            raise raw
        sample = parse_sample(raw, num_images)
        images = [_resolve(image, image_folder) for image in sample.images]
        messages = sample.messages
    except SampleError as error:
        problem, problem_message = error.problem.value, to_utf8(error.reason)
    columns = {"id": sample_id(raw) or f"#{number}", "messages": messages, "images": images}
    return {**columns, "problem": problem, "problem_message": problem_message}


def _resolve(image: Any, image_folder: str) -> str:
    if not isinstance(image, str):
        raise SampleError(f"Got a {type(image).__name__} as an image, expected a path such as 'folder/name.jpg'.")
    path = os.path.normpath(os.path.join(image_folder, image))
    # Symbolic links in the folder are the user's own, and may point anywhere.
    if not path.startswith(os.path.join(image_folder, "")):
        reason = f"The image {image!r} is outside of {image_folder}; use paths in the image folder, or set another."
        raise SampleError(reason, Problem.OUTSIDE_IMAGE_FOLDER)
    return to_utf8(path)


# JSON files


def _samples_of_file(path: str, image_folder: str, size: int, modified: int, version: int) -> Iterator[dict[str, Any]]:
    number = 0
    try:
        for number, raw in _read_json(path) if path.lower().endswith(".json") else _read_json_lines(path):
            yield _store(raw, number, image_folder)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise ConversationFileError(f"Cannot read {path} after sample {number}: {reason}.") from error
    if not number:
        raise ConversationFileError(f"{path} has no samples; expected at least one conversation.")


def _read_json(path: str) -> Iterator[tuple[int, Any]]:
    """Decode a JSON list item by item: lists of millions of samples do not fit in memory."""
    decode = json.JSONDecoder().raw_decode
    with open(path, encoding="utf-8-sig") as file:
        text = file.read(BLOCK_SIZE).lstrip()
        if not text.startswith("["):
            expected = "expected a JSON list, [...]; a file with one sample per line must be named .jsonl"
            raise ValueError(f"it begins with {text[:20]!r}, {expected}")
        text, position, number = text[1:], 0, 0
        while not text.startswith("]", position):
            if text[position : position + 1] in SEPARATORS:
                position += 1
                continue
            try:
                item, end = decode(text, position)
                if text[end : end + 1] not in (*SEPARATORS, "]"):
                    # Also where a block ends inside of a number.
                    raise json.JSONDecodeError("Expecting ',' or ']'", text, end)
            except json.JSONDecodeError:
                # The item may be incomplete. If it is broken, more text does not help.
                more = file.read(max(BLOCK_SIZE, len(text) - position))
                if not more or len(text) - position > MAX_SAMPLE_SIZE:
                    raise
                text, position = text[position:] + more, 0
            else:
                position, number = end, number + 1
                yield number, item
        if text[position + 1 :].strip() or file.read(BLOCK_SIZE).strip():
            raise ValueError("there is more text after the list")


def _read_json_lines(path: str) -> Iterator[tuple[int, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line := line.removeprefix(b"\xef\xbb\xbf").strip():
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield number, SampleError(f"Line {number} is not JSON ({error}); correct it, or remove it.")


# Datasets


def _find_dataset(path: Path, split: str) -> datasets.Dataset:
    markers = (datasets.config.DATASETDICT_JSON_FILENAME, datasets.config.DATASET_STATE_JSON_FILENAME)
    if any((path / marker).is_file() for marker in markers):
        saved = datasets.load_from_disk(path)
        if isinstance(saved, datasets.DatasetDict) and split not in saved:
            raise ConversationFileError(f"{path} has no split {split!r}; choose one of {', '.join(saved)}.")
        return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
    if path.suffix.lower() == ".parquet":
        return datasets.load_dataset("parquet", data_files={split: str(path)}, split=split)
    return datasets.load_dataset(str(path), split=split)


def _load_dataset(dataset: datasets.Dataset, image_folder: str) -> datasets.Dataset:
    columns = dataset.column_names
    if not {"messages", "conversations"} & set(columns):
        expected = "`messages` or `conversations`, and `images` or `image`"
        raise ConversationFileError(f"The dataset has the columns {', '.join(columns)}; expected {expected}.")
    if not len(dataset):
        raise ConversationFileError("The dataset has no samples; expected at least one conversation.")
    images = next((name for name in ("images", "image") if name in columns), None)
    used = [name for name in ("id", "messages", "conversations", images) if name in columns]
    arguments = {"dataset": dataset.select_columns(used), "image_folder": image_folder}
    feature = None if images is None else dataset.features[images]
    if feature is None or isinstance(getattr(feature, "feature", feature), datasets.Value):
        return _generate(_samples_of_dataset, {**arguments, "image_column": None}, FEATURES)
    # The dataset's own images are not copied, as `cast_column` would, and not decoded: a broken one would raise here.
    features = {name: feature for name, feature in FEATURES.items() if name != "images"}
    samples = _generate(_samples_of_dataset, {**arguments, "image_column": images}, features)
    column = dataset.select_columns(images)
    info = datasets.DatasetInfo(features=datasets.Features({images: _undecoded(feature)}))
    column = datasets.Dataset(column.data, info=info, indices_table=column._indices)
    return datasets.concatenate_datasets([samples, column], axis=1)


def _samples_of_dataset(
    dataset: datasets.Dataset, image_folder: str, image_column: str | None, version: int
) -> Iterator[dict[str, Any]]:
    numbers = count(1)
    # Batches of Arrow tables do not read the bytes of images.
    for batch in dataset.with_format("arrow").iter(SAMPLES_PER_BATCH):
        num_images: list[int | None] = [None] * len(batch)
        if image_column is not None:
            num_images = _count_images(batch.column(image_column))
            batch = batch.drop_columns(image_column)
        for raw, num in zip(batch.to_pylist(), num_images, strict=True):
            sample = _store(raw, next(numbers), image_folder, num)
            yield {name: value for name, value in sample.items() if num is None or name != "images"}


def _count_images(column: pa.ChunkedArray) -> list[int | None]:
    if pa.types.is_struct(column.type):
        return [int(is_image) for is_image in column.is_valid().to_pylist()]
    return [length or 0 for length in pc.list_value_length(column).to_pylist()]


def _undecoded(feature: Any) -> Any:
    if isinstance(feature, datasets.Image):
        return replace(feature, decode=False)
    if isinstance(feature, datasets.List | datasets.LargeList):
        return replace(feature, feature=_undecoded(feature.feature))
    return feature


__all__ = ["ConversationFileError", "load_conversations", "with_lengths"]
