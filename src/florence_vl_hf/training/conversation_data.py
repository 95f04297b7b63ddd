# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Conversations about pictures, from LLaVA's files or datasets, as one kind of rows and as messages with pictures."""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from enum import StrEnum
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any

import datasets
import ijson
import pyarrow as pa
import pyarrow.compute as pc
from datasets.exceptions import DatasetGenerationError
from PIL import Image
from transformers.image_utils import load_image

from ..conversion.original_processor import LLAVA_ROLES as ROLES
from ..processing import IMAGE_TOKEN


# Part of the key of what `datasets` caches: raise it when the same file is to give other rows.
ROWS_VERSION = 1
# Added to the length of rows with pictures. More than any text has words, so that rows without come before.
LENGTH_OF_MODALITY = 1 << 20
# About what a token takes, in English as in Chinese.
BYTES_PER_TOKEN = 4
# The number for Florence-2's own size of pictures and pooling.
TOKENS_PER_IMAGE = 577
ROWS_PER_BATCH = 1000

_ROW = {
    "id": datasets.Value("string"),
    "messages": datasets.List(
        {
            "role": datasets.Value("string"),
            "content": datasets.List({"type": datasets.Value("string"), "text": datasets.Value("string")}),
        }
    ),
    "images": datasets.List(datasets.Value("string")),
    "problem": datasets.Value("string"),
    "length": datasets.Value("int64"),
}


class Problem(StrEnum):
    """Kinds of what is wrong with a sample."""

    FORM = "malformed row"
    ROLES = "order of roles"
    MARKS = "image marks"
    OUTSIDE = "picture outside of its folder"
    MISSING = "missing picture"
    BROKEN = "broken picture"
    PICTURES_TOO_LONG = "pictures longer than max_length"
    NOTHING_TO_LEARN = "nothing to learn"
    TOO_LONG = "longer than max_length"


class SampleError(ValueError):
    """A sample that cannot be trained on. The message names it, says what is wrong and what to do."""

    def __init__(self, message: str, problem: Problem = Problem.FORM) -> None:
        super().__init__(message)
        self.problem = problem


class ConversationFileError(ValueError):
    """A file or dataset that cannot be read as conversations."""


def load_conversations(
    path: str | Path | datasets.Dataset, image_folder: str | Path | None = None, split: str = "train"
) -> datasets.Dataset:
    """
    Read conversations, of whichever kind, as rows of one kind that lie memory-mapped on the disk.

    Args:
        path (`str`, `Path` or `datasets.Dataset`): A `.json` file (a list) or `.jsonl` file whose rows have LLaVA's
            keys, `conversations` and perhaps `id` and `image`, or `messages` and perhaps `id` and `images`; or a
            dataset with columns of these names, as an object, as a folder that `save_to_disk` wrote, as a parquet
            file, or as what else `datasets.load_dataset` takes.
        image_folder (`str` or `Path`, *optional*): What paths of pictures are relative to. By default, the folder
            that `path` is or is in.
        split (`str`, *optional*, defaults to `"train"`): Of a dataset. A JSON file has no splits.

    Returns:
        `datasets.Dataset`: Columns `id`, `messages` (roles `system`, `user` and `assistant`; content as a list of
        items of `type` `text` or `image`, an image standing where its mark stood), `images` (paths, or the pictures
        of a dataset, undecoded; or `image`, where a dataset has one per row), `problem` (what makes a row malformed,
        mostly `None`) and `length` (see `with_lengths`). A malformed row stays, and `to_messages` raises what its
        `problem` says.

    Raises:
        ConversationFileError: If there is no such file, if it is no list or breaks off, or if it has no samples.
    """
    if isinstance(path, datasets.Dataset):
        return _of_dataset(path, os.path.abspath(image_folder or "."))
    folder = os.path.abspath(image_folder or (path if Path(path).is_dir() else Path(path).parent))
    if Path(path).suffix.lower() in (".json", ".jsonl"):
        return _of_file(Path(path), folder)
    return _of_dataset(_load_dataset(str(path), split), folder)


def with_lengths(dataset: datasets.Dataset, tokens_per_image: int = TOKENS_PER_IMAGE) -> datasets.Dataset:
    """
    Add the column `length`, or compute it anew: what `train_sampling_strategy="group_by_length"` of Trainer sorts by.

    Without this column Trainer asks each row for its `input_ids`, which rows do not have before they are collated.
    The lengths are estimates, which is enough to group by, and cost no tokenizer. Rows with pictures all come after
    those without, however long: as in the original, which groups by modality first, batches are then of one kind.
    (The gap between the kinds makes the column unfit for `batch_rebalance`, which balances sums of lengths.)

    Args:
        dataset (`datasets.Dataset`): Rows of `load_conversations`, which come with the column for 577 tokens an image.
        tokens_per_image (`int`, *optional*, defaults to 577): `num_image_tokens` of the model's configuration.
    """
    lengths = dataset.select_columns("messages").map(
        _length_of,
        fn_kwargs={"tokens_per_image": tokens_per_image},
        remove_columns="messages",
        features=datasets.Features({"length": _ROW["length"]}),
        desc="Lengths",
    )
    others = dataset.remove_columns([name for name in dataset.column_names if name == "length"])
    return datasets.concatenate_datasets([others, lengths], axis=1)


def to_messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    """
    A row as messages for `FlorenceVLProcessor.apply_chat_template`, with its pictures opened.

    Args:
        row (`dict`): Of `load_conversations`, or any with `messages` and `images`, or with LLaVA's keys. Pictures may
            be paths, `PIL.Image`s, or what `datasets` holds for an undecoded one (`{"bytes", "path"}`).

    Returns:
        `list[dict]`: Messages whose image items carry pictures, `{"type": "image", "image": PIL.Image}`.

    Raises:
        SampleError: If anything is wrong with the row.
    """
    messages, pictures = read_messages(row)
    return insert_pictures(messages, [open_picture(picture, row) for picture in pictures])


def read_messages(row: dict[str, Any]) -> tuple[list[dict[str, Any]], list[Any]]:
    """
    The messages of a row as its columns have them, image items without pictures, and the pictures unopened.

    Raises:
        SampleError: If the row is malformed, its roles are out of order, or its marks do not match its pictures.
    """
    try:
        if row.get("problem"):
            kind, _, reason = row["problem"].partition(": ")
            raise SampleError(reason, Problem(kind))
        pictures = _pictures_of(row)
        messages = _messages_of(row, len(pictures))
        _check_roles([message["role"] for message in messages])
        _check_marks(messages, len(pictures))
    except SampleError as error:
        raise _named(error, row) from None
    return messages, pictures


def insert_pictures(messages: list[dict[str, Any]], pictures: Iterable[Any]) -> list[dict[str, Any]]:
    """Messages whose image items carry the given pictures, in their order."""
    remaining = iter(pictures)
    return [
        {
            "role": message["role"],
            "content": [
                {"type": "image", "image": next(remaining)} if item["type"] == "image" else item
                for item in message["content"]
            ],
        }
        for message in messages
    ]


def open_picture(picture: Any, row: dict[str, Any]) -> Image.Image:
    """
    Read a picture completely, and close its file.

    It comes out as the processor makes it of a path: turned upright, and RGB, with transparency dropped as in the
    original. (Of a `PIL.Image` with transparency, the processor makes different pixels from release to release.)

    Raises:
        SampleError: If there is no such file, or it is no picture, truncated, or far too large.
    """
    name = "a picture"
    if isinstance(picture, dict):
        name = repr(picture.get("path") or "a picture in the dataset")
        picture = picture["path"] if picture.get("bytes") is None else BytesIO(picture["bytes"])
    if isinstance(picture, str | os.PathLike):
        name = repr(os.fspath(picture))
        if not os.path.isfile(picture):
            reason = f"there is no picture {name}; put it there, or name the folder of pictures"
            raise _named(SampleError(reason, Problem.MISSING), row)
    try:
        if isinstance(picture, Image.Image):
            return load_image(picture)
        with Image.open(picture) as opened:
            return load_image(opened)
    except Exception as error:
        # Whatever pillow's many decoders say of damaged files, or of what may be a decompression bomb.
        reason = f"{name} cannot be read ({' '.join(str(error).split())}); fetch it again, or leave the sample out"
        raise _named(SampleError(reason, Problem.BROKEN), row) from error


def _named(error: SampleError, row: dict[str, Any]) -> SampleError:
    name = "A sample without id" if row.get("id") is None else f"Sample {row['id']!r}"
    return SampleError(f"{name}: {error}.", error.problem)


# Reading of files and datasets


def _of_file(path: Path, folder: str) -> datasets.Dataset:
    if not path.is_file():
        raise ConversationFileError(f"There is no file {path}; name a .json or .jsonl file of conversations.")
    status = path.stat()
    key = {"size": status.st_size, "modified": status.st_mtime_ns}
    return _generate(_rows_of_file, {"path": str(path.resolve()), "folder": folder, **key}, _ROW)


def _of_dataset(dataset: datasets.Dataset, folder: str) -> datasets.Dataset:
    columns = dataset.column_names
    if not {"messages", "conversations"} & set(columns):
        raise ConversationFileError(
            f"The dataset has the columns {', '.join(columns)}; expected `messages`, and `images` or `image`."
        )
    if not len(dataset):
        raise _empty("The dataset")
    pictures = next((name for name in ("images", "image") if name in columns), None)
    kept = None if pictures is None or _holds_text(dataset.features[pictures]) else pictures
    features = {name: feature for name, feature in _ROW.items() if not (kept and name == "images")}
    used = [name for name in ("id", "messages", "conversations", pictures) if name in columns]
    rows = _generate(
        _rows_of_dataset, {"dataset": dataset.select_columns(used), "folder": folder, "kept": kept}, features
    )
    if kept is None:
        return rows
    # Bytes of pictures are not copied. Undecoded, for a broken one would raise as soon as its row is looked at.
    feature = _undecoded(dataset.features[kept])
    column = dataset.select_columns(kept)
    column = datasets.Dataset(
        column.data,
        info=datasets.DatasetInfo(features=datasets.Features({kept: feature})),
        indices_table=column._indices,
    )
    return datasets.concatenate_datasets([rows, column], axis=1)


def _load_dataset(path: str, split: str) -> datasets.Dataset:
    folder = Path(path)
    if (folder / datasets.config.DATASETDICT_JSON_FILENAME).is_file():
        splits = datasets.load_from_disk(path)
        if split not in splits:
            raise ConversationFileError(f"{path} has the splits {', '.join(splits)}, but no {split!r}; name another.")
        return splits[split]
    if (folder / datasets.config.DATASET_STATE_JSON_FILENAME).is_file():
        return datasets.load_from_disk(path)
    if folder.suffix.lower() == ".parquet":
        if not folder.is_file():
            raise ConversationFileError(f"There is no file {path}; name a file of conversations.")
        return datasets.load_dataset("parquet", data_files={split: path}, split=split)
    return datasets.load_dataset(path, split=split)


def _generate(rows: Any, arguments: dict[str, Any], features: dict[str, Any]) -> datasets.Dataset:
    """Write rows to the cache of `datasets`, unless they are there; the arguments are the key."""
    try:
        return datasets.Dataset.from_generator(
            rows, features=datasets.Features(features), gen_kwargs={**arguments, "version": ROWS_VERSION}
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ConversationFileError):
            raise error.__cause__ from None
        raise


def _empty(source: str) -> ConversationFileError:
    return ConversationFileError(f"{source} holds no samples; expected at least one conversation.")


def _rows_of_file(path: str, folder: str, size: int, modified: int, version: int) -> Iterator[dict[str, Any]]:
    read = _read_json if path.lower().endswith(".json") else _read_json_lines
    number = 0
    for number, row in read(path):
        problem = row if isinstance(row, SampleError) else None
        yield _normalised(row, number, folder, problem=problem)
    if not number:
        raise _empty(path)


def _read_json(path: str) -> Iterator[tuple[int, Any]]:
    """Entries of a list, counted from 1, without holding it in memory: the original's has 16.9 million."""
    with open(path, "rb") as file:
        if file.read(3) != b"\xef\xbb\xbf":
            file.seek(0)
        start = file.tell()
        beginning = file.read(1000).lstrip()[:20]
        if not beginning.startswith(b"["):
            raise ConversationFileError(
                f"{path} begins with {beginning.decode(errors='replace')!r}, expected a JSON list, [...]; "
                f"a file with one sample per line is named .jsonl."
            )
        file.seek(start)
        number = 0
        try:
            for row in ijson.items(file, "item"):
                number += 1
                yield number, row
        except (ijson.JSONError, UnicodeDecodeError) as error:
            raise ConversationFileError(
                f"{path} is broken after its row {number}: {' '.join(str(error).split())}. Mend it there."
            ) from error


def _read_json_lines(path: str) -> Iterator[tuple[int, Any]]:
    """What the lines hold, with their numbers; a `SampleError` for a line that is no JSON."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(b"\xef\xbb\xbf").strip()
            if not line:
                continue
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, SampleError(f"line {number} is no JSON ({error}); mend it or take it out")


def _rows_of_dataset(
    dataset: datasets.Dataset, folder: str, kept: str | None, version: int
) -> Iterator[dict[str, Any]]:
    numbers = count(1)
    # As Arrow, batches do not touch the bytes of pictures.
    for batch in dataset.with_format("arrow").iter(ROWS_PER_BATCH):
        num_pictures = [None] * len(batch)
        if kept is not None:
            num_pictures = _num_pictures(batch.column(kept))
            batch = batch.drop_columns(kept)
        for row, num in zip(batch.to_pylist(), num_pictures, strict=True):
            yield _normalised(row, next(numbers), folder, num_pictures=num)


def _num_pictures(column: pa.ChunkedArray) -> list[int]:
    if pa.types.is_struct(column.type):
        return [int(valid) for valid in column.is_valid().to_pylist()]
    return [length or 0 for length in pc.list_value_length(column).to_pylist()]


def _holds_text(feature: Any) -> bool:
    return isinstance(getattr(feature, "feature", feature), datasets.Value)


def _undecoded(feature: Any) -> Any:
    if isinstance(feature, datasets.Image):
        return replace(feature, decode=False)
    if isinstance(feature, datasets.List | datasets.LargeList):
        return replace(feature, feature=_undecoded(feature.feature))
    return feature


# Rows of one kind


def _normalised(
    row: Any, number: int, folder: str, problem: SampleError | None = None, num_pictures: int | None = None
) -> dict[str, Any]:
    """
    A row of a file or dataset as `load_conversations` gives it.

    Args:
        number (`int`): Where the row stands, counted from 1: its name, if it has no id.
        problem (`SampleError`, *optional*): What was wrong already when the row was read.
        num_pictures (`int`, *optional*): Of a row whose pictures are kept apart.
    """
    normalised: dict[str, Any] = {"id": f"row {number}", "messages": [], "problem": None}
    apart = num_pictures is not None
    images: list[str] = []
    try:
        if problem is not None:
            raise problem
        if not isinstance(row, dict):
            raise SampleError(f"got {_short(row)}, expected an object with `conversations` or `messages`")
        if isinstance(row.get("id"), str | int) and row["id"] != "":
            normalised["id"] = _encodable(str(row["id"]))
        if not apart:
            images = [_resolve(path, folder) for path in _pictures_of(row, text_only=True)]
        normalised["messages"] = _messages_of(row, num_pictures if apart else len(images))
    except SampleError as error:
        normalised["problem"] = f"{error.problem}: {_encodable(str(error))}"
        images = []
    if not apart:
        normalised["images"] = images
    return {**normalised, **_length_of(normalised)}


def _length_of(row: dict[str, Any], tokens_per_image: int = TOKENS_PER_IMAGE) -> dict[str, int]:
    items = [item for message in row["messages"] for item in message["content"]]
    num_images = sum(item["type"] == "image" for item in items)
    length = sum(len(item["text"].encode()) for item in items if item["type"] == "text") // BYTES_PER_TOKEN
    if num_images:
        return {"length": LENGTH_OF_MODALITY + length + num_images * tokens_per_image}
    return {"length": min(length, LENGTH_OF_MODALITY - 1)}


def _resolve(path: str, folder: str) -> str:
    resolved = os.path.normpath(os.path.join(folder, path))
    # Links inside of the folder are the user's own and may lead anywhere.
    if not resolved.startswith(os.path.join(folder, "")):
        raise SampleError(
            f"the picture {path!r} is outside of {folder}; give paths that are relative to the folder of pictures, "
            f"and name that folder",
            Problem.OUTSIDE,
        )
    return _encodable(resolved)


def _pictures_of(row: dict[str, Any], text_only: bool = False) -> list[Any]:
    """The pictures of a row, under either name: one, several or none."""
    value = row.get("images") if row.get("images") is not None else row.get("image")
    if value is None or (isinstance(value, str) and value == ""):
        return []
    pictures = value if isinstance(value, list) else [value]
    for picture in pictures:
        is_path = isinstance(picture, str) and picture != ""
        is_picture = isinstance(picture, Image.Image | os.PathLike) or (
            isinstance(picture, dict) and not (picture.get("bytes") is None and picture.get("path") is None)
        )
        if not (is_path or (is_picture and not text_only)):
            raise SampleError(f"got {_short(picture)} as a picture, expected a path, such as 'folder/name.jpg'")
    return pictures


def _messages_of(row: dict[str, Any], num_pictures: int) -> list[dict[str, Any]]:
    """The turns of a row in one form, from either of the two that they come in."""
    is_llava = row.get("messages") is None
    turns, role_key, text_key = row.get("messages"), "role", "content"
    roles = {role: role for role in ROLES.values()}
    if is_llava:
        turns, role_key, text_key, roles = row.get("conversations"), "from", "value", ROLES
    if not isinstance(turns, list) or not turns:
        raise SampleError(
            f"got {_short(turns)} as the conversation, expected a list of turns in `conversations` or `messages`"
        )
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise SampleError(f"turn {number} is {_short(turn)}, expected an object with `{role_key}`, `{text_key}`")
        if not isinstance(turn.get(role_key), str) or turn[role_key] not in roles:
            raise SampleError(
                f"turn {number} has {_short(turn.get(role_key))} as `{role_key}`, expected one of {', '.join(roles)}"
            )
        role, content = roles[turn[role_key]], turn.get(text_key)
        if not isinstance(content, str) and (is_llava or not isinstance(content, list)):
            raise SampleError(f"turn {number} has {_short(content)} as `{text_key}`, expected text")
        messages.append({"role": role, "content": _content_of(content, role, number)})

    # TRL's datasets have no marks where content is text: pictures come first in the first turn of the user.
    is_text = not is_llava and all(isinstance(turn["content"], str) for turn in turns)
    asked = next((message for message in messages if message["role"] == "user"), None)
    if is_text and asked is not None and not any(_num_marks(message) for message in messages):
        asked["content"] = [_item("image")] * num_pictures + asked["content"]
    return messages


def _content_of(content: str | list[Any], role: str, number: int) -> list[dict[str, Any]]:
    found = []
    for item in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        kind = item.get("type") if isinstance(item, dict) else None
        if kind == "image":
            found.append(_item("image"))
        elif kind == "text" and isinstance(item.get("text"), str):
            text = _encodable(item["text"])
            # Where the user does not speak, marks stay text, to be found wrong.
            found += _split_at_marks(text) if role == "user" else [_item("text", text)]
        else:
            raise SampleError(
                f"turn {number} holds {_short(item)}, expected items of type `text`, with text, and `image`"
            )
    return found or [_item("text", "")]


def _split_at_marks(text: str) -> list[dict[str, Any]]:
    items = []
    for number, piece in enumerate(text.split(IMAGE_TOKEN)):
        items += [_item("image")] * (number > 0) + [_item("text", piece)] * (piece != "")
    return items


def _item(kind: str, text: str | None = None) -> dict[str, Any]:
    return {"type": kind, "text": text}


def _num_marks(message: dict[str, Any]) -> int:
    return sum(item["type"] == "image" or IMAGE_TOKEN in item["text"] for item in message["content"])


def _check_roles(roles: list[str]) -> None:
    turns = roles[1:] if roles[0] == "system" else roles
    expected = ["user", "assistant"] * (len(turns) // 2)
    if not turns or turns != expected:
        raise SampleError(
            f"the roles are {', '.join(roles)}; expected user and assistant in turn, the user first and the assistant "
            f"last, after a system message or none",
            Problem.ROLES,
        )


def _check_marks(messages: list[dict[str, Any]], num_pictures: int) -> None:
    for message in messages:
        if message["role"] != "user" and _num_marks(message):
            raise SampleError(
                f"there is {IMAGE_TOKEN!r} or a picture in a turn of {message['role']}; only the user shows pictures",
                Problem.MARKS,
            )
    num_marks = sum(_num_marks(message) for message in messages)
    if num_marks != num_pictures:
        raise SampleError(
            f"there are {num_marks} {IMAGE_TOKEN!r} marks for {num_pictures} pictures; put one mark into the text for "
            f"each picture",
            Problem.MARKS,
        )


def _encodable(text: str) -> str:
    """The text, which JSON lets contain halves of characters that UTF-8 has no form for."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _short(value: Any) -> str:
    """A value as a message shows it."""
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


__all__ = [
    "ConversationFileError",
    "Problem",
    "SampleError",
    "insert_pictures",
    "load_conversations",
    "open_picture",
    "read_messages",
    "to_messages",
    "with_lengths",
]
