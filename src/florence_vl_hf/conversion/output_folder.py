# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""A folder that appears complete or not at all, and weights streamed into it one tensor at a time."""

import json
import os
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import _TYPES as SAFETENSORS_DTYPES
from tqdm import tqdm

from .errors import CheckpointError


DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
# Room for the small files beside the weights: tokenizer, configurations, model card.
SMALL_FILES = 64 * 2**20
COPIED_AT_ONCE = 64 * 2**20


@dataclass(frozen=True)
class ByteRange:
    """Bytes of a file, all of one tensor."""

    file: Path
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class TensorToWrite:
    """A tensor of the output: what it will be, and how to make it when its turn comes.

    Where it is made of the bytes of a file, and zeros after them, `copy_from` says which: to copy them is faster.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]
    copy_from: ByteRange | None = None

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@contextmanager
def folder_in_place_when_complete(output: Path) -> Iterator[Path]:
    """
    Give a folder beside `output` to write to, and move it to `output` when the block ends well.

    Raises:
        CheckpointError: If `output` exists and is not an empty folder: nothing is ever overwritten.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output} exists already; remove it or name another folder.")
    output = output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    # What a killed run left behind is of no use: nothing tells how far it came.
    for leftover in output.parent.glob(f".{output.name}.incomplete-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    incomplete = Path(tempfile.mkdtemp(prefix=f".{output.name}.incomplete-", dir=output.parent))
    try:
        yield incomplete
        incomplete.chmod(0o777 & ~_umask())
        os.replace(incomplete, output)
    except BaseException:
        shutil.rmtree(incomplete, ignore_errors=True)
        raise


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def check_disk_space(folder: Path, tensors: dict[str, TensorToWrite]) -> None:
    """Refuse to start what cannot be finished."""
    needed = sum(tensor.num_bytes for tensor in tensors.values()) + SMALL_FILES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"The disk of {folder} has {free / 2**30:.1f} GiB free, {needed / 2**30:.1f} GiB are needed; make room or "
            f"name a folder on another disk."
        )


def write_weights(folder: Path, tensors: dict[str, TensorToWrite], max_shard_size: int | str) -> None:
    """
    Write tensors as `model.safetensors`, or as shards and their index, holding one tensor at a time.

    Args:
        tensors (`dict[str, TensorToWrite]`): By name, in the order in which they are written.
        max_shard_size (`int` or `str`): Size of a file at most, in bytes or as `"5GB"`.
    """
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    num_bytes = sum(tensor.num_bytes for tensor in tensors.values())
    with tqdm(total=num_bytes, desc="Writing weights", unit="B", unit_scale=True, unit_divisor=1024) as progress:
        for file_name, names in split.filename_to_tensors.items():
            with open(folder / file_name, "wb") as file:
                _write_safetensors(file, {name: tensors[name] for name in names}, progress)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_safetensors(file: BinaryIO, tensors: dict[str, TensorToWrite], progress: tqdm) -> None:
    # The library only writes what is in memory as a whole. The format: length of the header, header, bytes.
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.num_bytes
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the bytes start at a multiple of 8
    file.write(struct.pack("<Q", len(encoded)))
    file.write(encoded)
    for name, tensor in tensors.items():
        if tensor.copy_from is not None and sys.platform == "linux":  # elsewhere, `sendfile` writes to sockets alone
            _copy_bytes(tensor.copy_from, file, progress)
            num_zeros = tensor.num_bytes - tensor.copy_from.num_bytes
            file.write(bytes(num_zeros))
            progress.update(num_zeros)
            continue
        made = tensor.make()
        if made.dtype != tensor.dtype or tuple(made.shape) != tensor.shape:
            raise CheckpointError(
                f"{name} is a {tuple(made.shape)} of {made.dtype}, expected {tensor.shape} of {tensor.dtype}; "
                f"fetch its file again."
            )
        file.write(made.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        progress.update(tensor.num_bytes)


def _copy_bytes(source: ByteRange, target: BinaryIO, progress: tqdm) -> None:
    target.flush()  # what follows goes past its buffer
    with open(source.file, "rb", buffering=0) as file:
        start, end = source.offset, source.offset + source.num_bytes
        while start < end:
            # From file to file within the kernel, as `shutil.copyfile` does it.
            num_copied = os.sendfile(target.fileno(), file.fileno(), start, min(end - start, COPIED_AT_ONCE))
            if not num_copied:
                raise CheckpointError(f"{source.file.name} became shorter while it was read; fetch it again.")
            progress.update(num_copied)
            start += num_copied
    target.seek(0, os.SEEK_END)


__all__ = ["ByteRange", "TensorToWrite", "check_disk_space", "folder_in_place_when_complete", "write_weights"]
