# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Loading of conversations, from files or datasets, as one memory-mapped dataset of parsed samples."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets.exceptions import DatasetGenerationError

from ..conversion.checkpoint_files import is_directory
from ..processing.text import to_utf8
from .samples import Sample, SampleError, parse_answers, parse_sample, sample_id


# Part of the key in the cache of `datasets`: increase it when the same file is to give other samples.
CACHE_VERSION = 4
# Lengths are estimated, without a tokenizer. An image is longer than any text, so that batches grouped by length hold
# samples with equally many images: the original groups by modality first, too.
LENGTH_OF_IMAGE = 1 << 20
# An estimate that holds for English and Chinese.
BYTES_PER_TOKEN = 4
# In characters. A file of JSON is read in blocks, and one sample is held in memory.
BLOCK_SIZE = 1 << 20
MAX_SAMPLE_SIZE = 1 << 26
# Between the items of a JSON list. The closing bracket is left.
SEPARATOR = re.compile(r"\s*(?:,\s*|(?=\]))")
STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*(?:"|$)|[\[\]{}]', re.DOTALL)

NESTED_TOO_DEEPLY = "It is nested too deeply; expected messages of text and images, correct or remove it."

TEXT = datasets.Value("string")
FEATURES = datasets.Features(
    {
        "id": TEXT,
        "messages": datasets.List({"role": TEXT, "content": datasets.List({"type": TEXT, "text": TEXT})}),
        "images": datasets.List(TEXT),
        "length": datasets.Value("int64"),
        "problem": TEXT,
        "problem_message": TEXT,
    }
)
EVALUATION_FEATURES = datasets.Features({**FEATURES, "answers": datasets.List(TEXT)})


class ConversationFileError(ValueError):
    """Raised for a file or dataset that cannot be read as conversations."""


def load_conversations(
    path: str | Path | datasets.Dataset,
    image_folder: str | Path | None = None,
    split: str = "train",
    *,
    for_evaluation: bool = False,
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
        for_evaluation (`bool`, *optional*, defaults to `False`): Whether samples may end with a question, and may have
            a list of strings in `answers`, which becomes a column.

    Returns:
        `datasets.Dataset`: The columns `id`, `messages` (as in `Sample`), `images` (paths, or a dataset's own
        undecoded images in its column `images` or `image`), `length` (an estimate, which the Trainer's
        `train_sampling_strategy="group_by_length"` sorts by), and `problem` (a `Problem`) and `problem_message`,
        `None` for valid samples. Invalid samples stay in the dataset; `to_messages` raises their `SampleError`.

    Raises:
        ConversationFileError: If there is no such file, or it is not a list, is truncated, or has no samples.
        CheckpointError: If it is neither a file, a directory nor the id of a dataset on the Hub.
    """
    if isinstance(path, datasets.Dataset):
        return _load_dataset(path, os.path.abspath(image_folder or "."), for_evaluation)
    if not os.path.exists(path) and not str(path).lower().endswith((".json", ".jsonl")):
        is_directory(path)  # refuses a mistyped path, which is not looked up on the Hub
    path = Path(path)
    image_folder = os.path.abspath(image_folder or (path if path.is_dir() else path.parent))
    if path.suffix.lower() not in (".json", ".jsonl"):
        return _load_dataset(_find_dataset(path, split), image_folder, for_evaluation)
    if not path.is_file():
        raise ConversationFileError(f"There is no file {path}; expected a file of conversations.")
    version = f"{CACHE_VERSION}: {path.stat().st_size} bytes, modified {path.stat().st_mtime_ns}"
    arguments = {"source": str(path.resolve()), "image_folder": image_folder, "version": version}
    return _parse_all({**arguments, "for_evaluation": for_evaluation})


def _parse_all(arguments: dict[str, Any]) -> datasets.Dataset:
    """Write parsed samples to the cache of `datasets`, unless it has samples of the same arguments."""
    try:
        features = EVALUATION_FEATURES if arguments["for_evaluation"] else FEATURES
        return datasets.Dataset.from_generator(_parse_samples, features=features, gen_kwargs=arguments)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ConversationFileError):
            raise error.__cause__ from None
        raise


def _parse_samples(
    source: str | datasets.Dataset,
    image_folder: str | None,
    version: str,
    for_evaluation: bool,
    image_column: str | None = None,
) -> Iterator[dict[str, Any]]:
    """Parse the samples of a file or dataset. Images of a dataset's own `image_column` stay there."""
    samples = _read_file(source) if isinstance(source, str) else enumerate(_read_dataset(source, image_column), 1)
    for number, raw in samples:
        parsed, answers, problem, message = Sample([], []), [], None, None
        try:
            if isinstance(raw, SampleError):
                raise raw
            parsed = parse_sample(raw, image_folder, for_evaluation=for_evaluation)
            answers = parse_answers(raw) if for_evaluation else []
        except SampleError as error:
            problem, message = error.problem.value, to_utf8(error.reason)
        yield {
            "id": sample_id(raw) or f"#{number}",
            "messages": parsed.messages,
            "images": parsed.images if image_column is None else [],
            "length": _estimate_length(parsed),
            "problem": problem,
            "problem_message": message,
        } | ({"answers": answers} if for_evaluation else {})


def _estimate_length(sample: Sample) -> int:
    texts = (item["text"] for message in sample.messages for item in message["content"])
    num_bytes = sum(len(text.encode()) for text in texts if text is not None)
    return min(num_bytes // BYTES_PER_TOKEN, LENGTH_OF_IMAGE - 1) + len(sample.images) * LENGTH_OF_IMAGE


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
    with open(path, encoding="utf-8-sig") as file:
        text = file.read(BLOCK_SIZE).lstrip()
        if not text.startswith("["):
            expected = "expected a JSON list, [...]; a file with one sample per line must be named .jsonl"
            raise ValueError(f"it begins with {text[:20]!r}, {expected}")
        text, position = text[1:].lstrip(), 0
        while not text.startswith("]", position):
            try:
                item, end = _decode_item(text, position)
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


def _parse_int(digits: str) -> int | str:
    # Python refuses to convert more than a few thousand digits. No sample has such a number for a good reason.
    return int(digits) if len(digits) < 100 else digits


DECODER = json.JSONDecoder(parse_int=_parse_int)


def _decode_item(text: str, position: int) -> tuple[Any, int]:
    """Return the JSON value that begins at a position, and where it ends."""
    try:
        return DECODER.raw_decode(text, position)
    except RecursionError:
        depth = 0
        for match in STRING_OR_BRACKET.finditer(text, position):
            depth += (match[0] in "[{") - (match[0] in "]}")
            if depth == 0:
                return SampleError(NESTED_TOO_DEEPLY), match.end()
        raise json.JSONDecodeError("Unterminated list or object", text, position) from None


def _read_json_lines(path: str) -> Iterator[tuple[int, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(_read_lines(file), 1):
            line = line.removeprefix(b"\xef\xbb\xbf").strip()
            try:
                if len(line) > MAX_SAMPLE_SIZE:
                    raise ValueError(f"it is longer than {MAX_SAMPLE_SIZE} bytes")
                if line:
                    yield number, DECODER.decode(line.decode())
            except RecursionError:
                yield number, SampleError(NESTED_TOO_DEEPLY)
            except ValueError as error:
                yield number, SampleError(f"Line {number} is not JSON ({error}); correct it, or remove it.")


def _read_lines(file: BinaryIO) -> Iterator[bytes]:
    """Read lines, of which long ones are cut: a file without line ends may not fit in memory."""
    while line := file.readline(MAX_SAMPLE_SIZE + 1):
        end = line
        while len(end) > MAX_SAMPLE_SIZE and not end.endswith(b"\n"):
            end = file.readline(MAX_SAMPLE_SIZE + 1)
        yield line


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


def _load_dataset(dataset: datasets.Dataset, image_folder: str, for_evaluation: bool) -> datasets.Dataset:
    columns = dataset.column_names
    if not {"messages", "conversations"} & set(columns):
        expected = "`messages` or `conversations`, and `images` or `image`"
        raise ConversationFileError(f"The dataset has the columns {', '.join(columns)}; expected {expected}.")
    if not len(dataset):
        raise ConversationFileError("The dataset has no samples; expected at least one conversation.")
    images = next((name for name in ("images", "image") if name in columns), None)
    names = ["id", "messages", "conversations", images, *(["answers"] if for_evaluation else [])]
    source = dataset.select_columns([name for name in names if name in columns])
    arguments = {"source": source, "image_folder": image_folder, "version": str(CACHE_VERSION)}
    arguments["for_evaluation"] = for_evaluation
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


__all__ = ["ConversationFileError", "load_conversations"]
