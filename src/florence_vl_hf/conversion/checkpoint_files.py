# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Checkpoint files: weights read lazily and written in shards, JSON, Hub downloads, atomic output directories."""

import glob
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import _TYPES as SAFETENSORS_DTYPES
from safetensors.torch import save_file
from tqdm import tqdm


# Files of a Hub repository that are downloaded to read a checkpoint.
CHECKPOINT_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt")
# Names that Transformers gives to weights, in order of preference: an index, or a single file.
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
# Bytes of a table that are read at once while it is padded.
CHUNK_SIZE = 128 * 2**20
# Bytes that are read from a PyTorch file before it is reopened. Pages of a mapped file count as memory until then.
REOPEN_AFTER = 256 * 2**20
# Free space that is required in addition to the weights: tokenizer, configurations, model card.
SMALL_FILES_SIZE = 64 * 2**20


class CheckpointError(ValueError):
    """Raised when a checkpoint cannot be read, converted or written. The message names the file or the tensor."""


@dataclass(frozen=True)
class LazyTensor:
    """
    A tensor whose name, dtype and shape are known, and whose values are read on demand.

    Args:
        name (`str`): Name in `file`.
        file (`Path`): File that holds the tensor.
        dtype (`torch.dtype`): Dtype of what `load` returns.
        shape (`tuple[int, ...]`): Shape of what `load` returns.
        load (`Callable`): Reads the tensor. It may be a view of the mapped file.
        load_rows (`Callable`, *optional*): Reads rows from a start to a stop, where a table is read in chunks.
    """

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]
    load_rows: Callable[[int, int], torch.Tensor] | None = None

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def __str__(self) -> str:
        return f"{self.name} in {self.file.name}"

    def transposed(self) -> "LazyTensor":
        """Swap the dimensions."""
        return replace(self, shape=self.shape[::-1], load=lambda: self.load().T, load_rows=None)

    def with_rows(self, num_rows: int) -> "LazyTensor":
        """Cut the tensor to its first `num_rows` rows, or pad it with rows of zeros."""
        if num_rows == self.shape[0]:
            return self
        load = partial(_load_padded, self, num_rows) if num_rows > self.shape[0] else lambda: self.load()[:num_rows]
        return replace(self, shape=(num_rows, *self.shape[1:]), load=load, load_rows=None)

    def to(self, dtype: torch.dtype) -> "LazyTensor":
        """Cast a floating-point tensor. Others, such as indices, keep their dtype."""
        load_rows = self.load_rows
        if dtype == self.dtype or not self.dtype.is_floating_point:
            return self
        return replace(
            self,
            dtype=dtype,
            load=lambda: self.load().to(dtype),
            load_rows=load_rows and (lambda start, stop: load_rows(start, stop).to(dtype)),
        )


def _load_padded(tensor: LazyTensor, num_rows: int) -> torch.Tensor:
    """Read a table into a larger one of zeros, in chunks: at no time are both in memory."""
    padded = torch.zeros((num_rows, *tensor.shape[1:]), dtype=tensor.dtype)
    stored_rows = tensor.shape[0]
    if tensor.load_rows is None:
        padded[:stored_rows] = tensor.load()
        return padded
    chunk = max(1, CHUNK_SIZE * stored_rows // max(1, tensor.num_bytes))
    for start in range(0, stored_rows, chunk):
        stop = min(start + chunk, stored_rows)
        padded[start:stop] = tensor.load_rows(start, stop)
    return padded


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}; give the directory of a checkpoint.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); download it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}, expected an object; download it again.")
    return content


def read_tensors(directory: Path) -> dict[str, LazyTensor]:
    """List the tensors of a checkpoint by name, none if it has no weights. No pickle is executed."""
    file_name = next((name for name in WEIGHT_FILES if (directory / name).exists()), None)
    if file_name is None:
        return {}
    path = directory / file_name
    if not file_name.endswith(".index.json"):
        return read_tensor_file(path)
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{path} has no `weight_map` of tensor names to files; download it again.")
    tensors: dict[str, LazyTensor] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or shard in ("", ".", "..") or "\\" in shard:
            raise CheckpointError(f"{file_name} names the file {shard!r}, which may lie outside of {directory}.")
        if not (directory / shard).is_file():
            raise CheckpointError(f"{file_name} names the file {shard}, which is not in {directory}; download it.")
        tensors |= read_tensor_file(directory / shard)
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file.name != shard:
            raise CheckpointError(
                f"{file_name} says that {name} is in {shard}, but it is not; download {shard} again."
            )
    return tensors


def read_tensor_file(path: Path) -> dict[str, LazyTensor]:
    """List the tensors of one safetensors or PyTorch file by name, without reading their values."""
    return _read_safetensors_file(path) if path.suffix == ".safetensors" else _read_pytorch_file(path)


def _read_safetensors_file(path: Path) -> dict[str, LazyTensor]:
    def load(name: str, *rows: int) -> torch.Tensor:
        # Reopened each time: pages of the mapped file count as memory until the last of its tensors is dropped.
        with safe_open(path, framework="pt") as file:
            return file.get_slice(name)[slice(*rows)] if rows else file.get_tensor(name)

    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                piece = file.get_slice(name)
                dtype = SAFETENSORS_DTYPES.get(piece.get_dtype())
                if dtype is None:
                    raise CheckpointError(f"{name} in {path.name} has the unsupported dtype {piece.get_dtype()}.")
                read = partial(load, name)
                tensors[name] = LazyTensor(name, path, dtype, tuple(piece.get_shape()), read, read)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path.name} is damaged or incomplete ({error}); download it again.") from error
    return tensors


def _read_pytorch_file(path: Path) -> dict[str, LazyTensor]:
    file = _PyTorchFile(path)
    tensors = {}
    for name, tensor in file.state_dict.items():
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{path.name} holds {name!r}, which is no tensor; give the model's weights.")
        load = partial(file.load, name)
        tensors[name] = LazyTensor(name, path, tensor.dtype, tuple(tensor.shape), load, load)
    return tensors


class _PyTorchFile:
    """A mapped PyTorch file, which is reopened now and then: to open it for each tensor would take long."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state_dict = _open_pytorch_file(path)
        self.num_bytes_read = 0

    def load(self, name: str, *rows: int) -> torch.Tensor:
        if self.num_bytes_read > REOPEN_AFTER:
            self.state_dict, self.num_bytes_read = _open_pytorch_file(self.path), 0
        tensor = self.state_dict[name][slice(*rows)] if rows else self.state_dict[name]
        self.num_bytes_read += tensor.nbytes
        return tensor


def _open_pytorch_file(path: Path) -> dict[str, torch.Tensor]:
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path.name} would run code when it is loaded ({str(error).splitlines()[0]}); refused. Ask its authors "
            f"for safetensors."
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(
            f"{path.name} is damaged or incomplete ({str(error).splitlines()[0]}); download it again."
        ) from error
    if not isinstance(state_dict, dict):
        raise CheckpointError(f"{path.name} holds a {type(state_dict).__name__}, expected a dict of tensors.")
    return state_dict


def resolve_checkpoint(
    path_or_id: str | Path, allow_patterns: tuple[str, ...] = CHECKPOINT_FILES, **hub_kwargs: Any
) -> Path:
    """Return a local directory as it is, or download a Hub repository. `hub_kwargs` are of `snapshot_download`."""
    if not str(path_or_id).strip():
        raise CheckpointError("Got an empty path; give a directory or the id of a Hub repository.")
    directory = Path(path_or_id)
    if directory.is_dir():
        return directory
    if directory.exists() or len(directory.parts) != 2 or directory.is_absolute() or directory.parts[0] in (".", ".."):
        raise CheckpointError(f"{path_or_id} is neither a directory nor the id of a Hub repository.")
    try:
        return Path(snapshot_download(str(path_or_id), allow_patterns=list(allow_patterns), **hub_kwargs))
    except Exception as error:
        # Offline, not found, gated, no token: huggingface_hub says which, in one of many exceptions.
        raise CheckpointError(
            f"{path_or_id} is not a directory, and cannot be downloaded from the Hub: {error}"
        ) from error


@contextmanager
def output_directory(output: Path) -> Iterator[Path]:
    """
    Yield a temporary directory, which becomes `output` when the block succeeds and is removed otherwise.

    Raises:
        CheckpointError: If `output` exists and is not an empty directory. Nothing is ever overwritten.
    """
    if not output.name:
        raise CheckpointError(f"{str(output)!r} cannot be created; give the path of a new output directory.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output} exists already; remove it or give another output directory.")
    output = output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{output.name}.incomplete-"
    # What a killed run left behind is of no use: nothing tells which of its files are complete.
    for leftover in output.parent.glob(f"{glob.escape(prefix)}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    incomplete = Path(tempfile.mkdtemp(prefix=prefix, dir=output.parent))
    os.umask(umask := os.umask(0))  # can only be read by setting it
    try:
        yield incomplete
        incomplete.chmod(0o777 & ~umask)
        os.replace(incomplete, output)
    except BaseException:
        shutil.rmtree(incomplete, ignore_errors=True)
        raise


def write_tensors(directory: Path, tensors: dict[str, LazyTensor], max_shard_size: int | str) -> None:
    """
    Write tensors as `model.safetensors`, or as shards and their index, with one shard in memory at a time.

    Args:
        directory (`Path`): Existing directory.
        tensors (`dict[str, LazyTensor]`): Tensors by their new names, in order.
        max_shard_size (`int` or `str`): Maximum size of a file, in bytes or as `"1GB"`. A larger tensor gets its own.
    """
    num_bytes = sum(tensor.num_bytes for tensor in tensors.values())
    required, free = num_bytes + SMALL_FILES_SIZE, shutil.disk_usage(directory).free
    if free < required:
        raise CheckpointError(
            f"The disk of {directory} has {free / 2**30:.1f} GiB free, but {required / 2**30:.1f} GiB are required; "
            f"make room or give an output directory on another disk."
        )
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    with tqdm(total=num_bytes, desc="Writing weights", unit="B", unit_scale=True, unit_divisor=1024) as progress:
        for file_name, names in split.filename_to_tensors.items():
            _write_shard(directory / file_name, {name: tensors[name] for name in names})
            progress.update(sum(tensors[name].num_bytes for name in names))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(path: Path, tensors: dict[str, LazyTensor]) -> None:
    shard: dict[str, torch.Tensor] = {}
    for name, lazy in tensors.items():
        tensor = lazy.load()
        if tensor.dtype != lazy.dtype or tuple(tensor.shape) != lazy.shape:
            raise CheckpointError(
                f"{name} is a {tuple(tensor.shape)} of {tensor.dtype}, expected {lazy.shape} of {lazy.dtype}; "
                f"download {lazy.file.name} again."
            )
        # Safetensors refuses tensors that share memory: one that is written under two names.
        is_shared = any(tensor.data_ptr() == other.data_ptr() for other in shard.values())
        shard[name] = tensor.clone() if is_shared else tensor.contiguous()
    try:
        save_file(shard, path, metadata={"format": "pt"})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path.name} cannot be written: {error}") from error
