# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Tensors of a checkpoint folder, found without reading them and read one at a time. No pickle is executed."""

import json
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import _TYPES as SAFETENSORS_DTYPES

from .errors import CheckpointError


# The names that Transformers gives to weights, best first: an index, or a single file.
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)

# Bytes that are read of a PyTorch file before it is opened anew.
REOPEN_AFTER = 256 * 2**20


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its name there, what it will be, how to read it, and where its bytes begin, if known."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]
    offset: int | None = None

    def __str__(self) -> str:
        return f"{self.name} in {self.file.name}"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, or say which file is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}; give the folder of a checkpoint.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); fetch it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}, expected an object; fetch it again.")
    return content


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """
    List the tensors of a checkpoint folder, by name, without reading them.

    Returns an empty `dict` if the folder holds no weights.

    Raises:
        CheckpointError: If a shard is missing, damaged, outside of the folder, or has not what the index promises.
    """
    for file_name in WEIGHT_FILES:
        path = folder / file_name
        if not path.exists():
            continue
        if not file_name.endswith(".index.json"):
            return list_file(path)
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise CheckpointError(f"{path} has no `weight_map` of tensor names to files; fetch it again.")
        return _list_shards(folder, path, weight_map)
    return {}


def _list_shards(folder: Path, index: Path, weight_map: dict[str, str]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or shard in ("", ".", "..") or "\\" in shard:
            raise CheckpointError(
                f"{index.name} names the file {shard!r}, which may lie outside of {folder}; refused."
            )
        if not (folder / shard).is_file():
            raise CheckpointError(f"{index.name} names the file {shard}, which is not in {folder}; fetch it.")
        tensors.update(list_file(folder / shard))
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file.name != shard:
            raise CheckpointError(f"{index.name} says that {name} is in {shard}, but it is not; fetch {shard} again.")
    return tensors


def list_file(path: Path) -> dict[str, StoredTensor]:
    """List the tensors of one safetensors or PyTorch file."""
    return _list_safetensors(path) if path.suffix == ".safetensors" else _list_pytorch(path)


def _list_safetensors(path: Path) -> dict[str, StoredTensor]:
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            offsets = _safetensors_offsets(path)
            for name in file.keys():
                piece = file.get_slice(name)
                dtype, shape = SAFETENSORS_DTYPES[piece.get_dtype()], tuple(piece.get_shape())
                read = partial(_read_safetensors, path, name)
                tensors[name] = StoredTensor(name, path, dtype, shape, read, offsets[name])
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path.name} is damaged or cut short ({error}); fetch it again.") from error
    return tensors


def _safetensors_offsets(path: Path) -> dict[str, int]:
    """Where each tensor's bytes begin: the library, which has checked the file by now, does not tell."""
    with open(path, "rb") as file:
        (header_length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_length))
    return {
        name: 8 + header_length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"
    }


def _read_safetensors(path: Path, name: str) -> torch.Tensor:
    # Opened anew for each tensor: pages of the file that were read count as memory for as long as it is open.
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def _list_pytorch(path: Path) -> dict[str, StoredTensor]:
    file = _PyTorchFile(path)
    not_tensors = [name for name, value in file.state_dict.items() if not isinstance(value, torch.Tensor)]
    if not_tensors:
        raise CheckpointError(f"{path.name} holds {not_tensors[0]!r}, which is no tensor; give the model's weights.")
    return {
        name: StoredTensor(name, path, tensor.dtype, tuple(tensor.shape), partial(file.read, name))
        for name, tensor in file.state_dict.items()
    }


class _PyTorchFile:
    """A PyTorch file whose tensors are read as they are asked for.

    It stays open over many tensors, for opening takes a while, but not over all: what was read of it counts as memory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state_dict = _load_pytorch(path)
        self.num_bytes_read = 0

    def read(self, name: str) -> torch.Tensor:
        if self.num_bytes_read > REOPEN_AFTER:
            self.state_dict, self.num_bytes_read = _load_pytorch(self.path), 0
        tensor = self.state_dict[name]
        self.num_bytes_read += tensor.nbytes
        return tensor


def _load_pytorch(path: Path) -> dict[str, torch.Tensor]:
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path.name} wants to run code when it is loaded ({str(error).splitlines()[0]}); refused. Ask its "
            f"authors for safetensors."
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(
            f"{path.name} is damaged or cut short ({str(error).splitlines()[0]}); fetch it again."
        ) from error
    if not isinstance(state_dict, dict):
        raise CheckpointError(f"{path.name} holds a {type(state_dict).__name__}, expected a dict of tensors.")
    return state_dict


__all__ = ["WEIGHT_FILES", "StoredTensor", "find_tensors", "list_file", "read_json"]
