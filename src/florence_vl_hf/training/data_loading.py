# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Loading of conversations, from files or datasets, as one memory-mapped dataset of parsed samples."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets.exceptions import DatasetGenerationError

from ..conversion.checkpoint_files import is_directory
from .samples import Sample, SampleError, parse_sample, sample_id, to_utf8


# Part of the key in the cache of `datasets`: increase it when the same file is to give other samples.
CACHE_VERSION = 3
# Added to the length of samples with images. Text alone is shorter, so samples without images sort first.
LENGTH_OF_IMAGES = 1 << 20
# An estimate that holds for English and Chinese.
BYTES_PER_TOKEN = 4
# In characters. A file of JSON is read in blocks, and one sample is held in memory.
BLOCK_SIZE = 1 << 20
MAX_SAMPLE_SIZE = 1 << 26
# Between the items of a JSON list. The closing bracket is left.
SEPARATOR = re.compile(r"\s*(?:,\s*|(?=\]))")

TEXT = datasets.Value("string")
FEATURES = datasets.Features(
    {
        "id": TEXT,
        "messages": datasets.List({"role": TEXT, "content": datasets.List({"type": TEXT, "text": TEXT})}),
        "images": datasets.List(TEXT),
        "problem": TEXT,
        "problem_message": TEXT,
    }
)


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
        CheckpointError: If it is neither a file, a directory nor the id of a dataset on the Hub.
    """
    if isinstance(path, datasets.Dataset):
        return _load_dataset(path, os.path.abspath(image_folder or "."))
    if not os.path.exists(path) and not str(path).lower().endswith((".json", ".jsonl")):
        is_directory(path)  # refuses a mistyped path, which is not looked up on the Hub
    path = Path(path)
    image_folder = os.path.abspath(image_folder or (path if path.is_dir() else path.parent))
    if path.suffix.lower() not in (".json", ".jsonl"):
        return _load_dataset(_find_dataset(path, split), image_folder)
    if not path.is_file():
        raise ConversationFileError(f"There is no file {path}; expected a file of conversations.")
    version = f"{CACHE_VERSION}: {path.stat().st_size} bytes, modified {path.stat().st_mtime_ns}"
    return _parse_all({"source": str(path.resolve()), "image_folder": image_folder, "version": version})


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
    others = dataset.select_columns([name for name in dataset.column_names if name != "length"])
    return datasets.concatenate_datasets([others, lengths], axis=1)


def _estimate_length(sample: dict[str, Any], tokens_per_image: int) -> dict[str, int]:
    texts = [item["text"] for message in sample["messages"] for item in message["content"]]
    length = sum(len(text.encode()) for text in texts if text is not None) // BYTES_PER_TOKEN
    if num_images := texts.count(None):
        return {"length": LENGTH_OF_IMAGES + length + num_images * tokens_per_image}
    return {"length": min(length, LENGTH_OF_IMAGES - 1)}


def _parse_all(arguments: dict[str, Any]) -> datasets.Dataset:
    """Write parsed samples to the cache of `datasets`, unless it has samples of the same arguments."""
    try:
        return datasets.Dataset.from_generator(_parse_samples, features=FEATURES, gen_kwargs=arguments)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ConversationFileError):
            raise error.__cause__ from None
        raise


def _parse_samples(
    source: str | datasets.Dataset, image_folder: str | None, version: str, image_column: str | None = None
) -> Iterator[dict[str, Any]]:
    """Parse the samples of a file or dataset. Images of a dataset's own `image_column` stay there."""
    samples = _read_file(source) if isinstance(source, str) else enumerate(_read_dataset(source, image_column), 1)
    for number, raw in samples:
        parsed, problem, message = Sample([], []), None, None
        try:
            if isinstance(raw, SampleError):
                raise raw
            parsed = parse_sample(raw, image_folder)
        except SampleError as error:
            problem, message = error.problem.value, to_utf8(error.reason)
        columns = {"id": sample_id(raw) or f"#{number}", "messages": parsed.messages}
        columns["images"] = parsed.images if image_column is None else []
        yield {**columns, "problem": problem, "problem_message": message}


def _read_file(path: str) -> Iterator[tuple[int, Any]]:
    number = 0
    samples = enumerate(_read_json(path), 1) if path.lower().endswith(".json") else _read_json_lines(path)
    try:
        for number, raw in samples:
            yield number, raw
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise ConversationFileError(f"Cannot read {path} after sample {number}: {reason}.") from error
    if not number:
        raise ConversationFileError(f"{path} has no samples; expected at least one conversation.")


def _read_json(path: str) -> Iterator[Any]:
    """Decode a JSON list item by item: lists of millions of samples do not fit in memory."""
    decode = json.JSONDecoder().raw_decode
    with open(path, encoding="utf-8-sig") as file:
        text = file.read(BLOCK_SIZE).lstrip()
        if not text.startswith("["):
            expected = "expected a JSON list, [...]; a file with one sample per line must be named .jsonl"
            raise ValueError(f"it begins with {text[:20]!r}, {expected}")
        text, position = text[1:].lstrip(), 0
        while not text.startswith("]", position):
            try:
                item, end = decode(text, position)
                separator = SEPARATOR.match(text, end)
                if separator is None:
                    raise json.JSONDecodeError("Expecting ',' or ']'", text, end)
            except json.JSONDecodeError:
                # The item, or a number, may continue in the next block. If it is broken, more text does not help.
                more = file.read(max(BLOCK_SIZE, len(text) - position))
                if not more or len(text) - position > MAX_SAMPLE_SIZE:
                    raise
                text, position = (text[position:] + more).lstrip(), 0
            else:
                position = separator.end()
                yield item
        if text[position + 1 :].strip() or file.read(BLOCK_SIZE).strip():
            raise ValueError("there is more text after the list")


def _read_json_lines(path: str) -> Iterator[tuple[int, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line := line.removeprefix(b"\xef\xbb\xbf").strip():
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield number, SampleError(f"Line {number} is not JSON ({error}); correct it, or remove it.")


def _find_dataset(path: Path, split: str) -> datasets.Dataset:
    if path.suffix.lower() == ".parquet":
        return datasets.load_dataset("parquet", data_files={split: str(path)}, split=split)
    try:
        saved = datasets.load_from_disk(path)
    except FileNotFoundError:
        return datasets.load_dataset(str(path), split=split)
    if isinstance(saved, datasets.Dataset):
        return saved
    if split not in saved:
        raise ConversationFileError(f"{path} has no split {split!r}; choose one of {', '.join(saved)}.")
    return saved[split]


def _load_dataset(dataset: datasets.Dataset, image_folder: str) -> datasets.Dataset:
    columns = dataset.column_names
    if not {"messages", "conversations"} & set(columns):
        expected = "`messages` or `conversations`, and `images` or `image`"
        raise ConversationFileError(f"The dataset has the columns {', '.join(columns)}; expected {expected}.")
    if not len(dataset):
        raise ConversationFileError("The dataset has no samples; expected at least one conversation.")
    images = next((name for name in ("images", "image") if name in columns), None)
    source = dataset.select_columns([n for n in ("id", "messages", "conversations", images) if n in columns])
    arguments = {"source": source, "image_folder": image_folder, "version": str(CACHE_VERSION)}
    feature = None if images is None else dataset.features[images]
    if feature is None or isinstance(getattr(feature, "feature", feature), datasets.Value):
        return _parse_all(arguments)
    own_images = dataset.select_columns(images)
    # Undecoded, as decoding would raise here for a broken image; `cast_column` would copy all images.
    own_images.info.features = datasets.Features.from_arrow_schema(own_images.data.schema.remove_metadata())
    parsed = _parse_all({**arguments, "image_folder": None, "image_column": images}).remove_columns("images")
    return datasets.concatenate_datasets([parsed, own_images], axis=1)


def _read_dataset(dataset: datasets.Dataset, image_column: str | None) -> Iterator[Any]:
    # Batches of Arrow tables do not read the bytes of images.
    for batch in dataset.with_format("arrow").iter(1000):
        if image_column is not None:
            column = batch.column(image_column)
            counts = column.is_valid() if pa.types.is_struct(column.type) else pc.list_value_length(column)
            batch = batch.drop_columns(image_column).append_column("num_images", counts)
        for raw in batch.to_pylist():
            if image_column is not None:
                # Only their number is checked.
                raw["images"] = [{}] * (raw["num_images"] or 0)
            yield raw


__all__ = ["ConversationFileError", "load_conversations", "with_lengths"]
