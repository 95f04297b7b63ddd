# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Checkpoint files: weights read lazily and written in shards, JSON, Hub downloads, atomic output directories."""

import json
import os
import pickle
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from huggingface_hub import snapshot_download, split_state_dict_into_shards_factory
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from safetensors.torch import _TYPES as SAFETENSORS_DTYPES
from safetensors.torch import save_file
from tqdm import tqdm
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME


# Files of a Hub repository that are downloaded to read a checkpoint, without and with its weights.
SETTINGS_FILES = ("*.json", "*.model", "*.txt")
CHECKPOINT_FILES = (*SETTINGS_FILES, "*.safetensors", "*.bin")
# JSON objects that Transformers and peft read.
JSON_FILES = (
    *("config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    "adapter_config.json",
)
# Names that Transformers gives to weights, in order of preference: an index, or a single file.
WEIGHT_FILES = (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME)
# Rows of a table that are read at once while it is cut or padded: 128 MiB of Llama-3.1-8B's.
ROWS_PER_CHUNK = 2**14
# Bytes that are read from a PyTorch file before it is reopened. Pages of a mapped file count as memory until then.
REOPEN_AFTER = 256 * 2**20


class CheckpointError(ValueError):
    """Raised when a checkpoint cannot be read, converted or written. The message names the file or the tensor."""


@dataclass(frozen=True)
class LazyTensor:
    """
    A tensor whose name, dtype and shape are known, and whose values are read on demand.

    `name` is that in `file`. What `load` returns has `dtype` and `shape`, and may be a view of the mapped file.
    """

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def __str__(self) -> str:
        return f"{self.name} in {self.file.name}"

    def transposed(self) -> "LazyTensor":
        """Swap the dimensions."""
        name = f"the transpose of {self.name}"
        return replace(self, name=name, shape=self.shape[::-1], load=lambda: self.load().T)

    def with_rows(self, num_rows: int) -> "LazyTensor":
        """Cut the tensor to its first `num_rows` rows, or pad it with rows of zeros."""

        def load() -> torch.Tensor:
            rows = torch.zeros((num_rows, *self.shape[1:]), dtype=self.dtype)
            # Each chunk is read from a view of its own, since what was read of a view counts as memory until the view
            # is dropped.
            for i, chunk in enumerate(rows[: self.shape[0]].split(ROWS_PER_CHUNK)):
                start = i * ROWS_PER_CHUNK
                chunk.copy_(self.load()[start : start + len(chunk)])
            return rows

        return self if num_rows == self.shape[0] else replace(self, shape=(num_rows, *self.shape[1:]), load=load)

    def to(self, dtype: torch.dtype | None) -> "LazyTensor":
        """Cast the tensor if a dtype is given."""
        if dtype is None or dtype == self.dtype:
            return self
        return replace(self, dtype=dtype, load=lambda: self.load().to(dtype))


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
    file_name = next((name for name in WEIGHT_FILES if os.path.lexists(directory / name)), None)
    if file_name is None:
        return {}
    if not file_name.endswith(".index.json"):
        return read_tensor_file(directory / file_name)
    weight_map = read_json(directory / file_name).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{directory / file_name} has no `weight_map` of tensor names to files.")
    tensors: dict[str, LazyTensor] = {}
    present = [path.name for path in directory.iterdir()]
    for shard in sorted(set(map(str, weight_map.values()))):
        if shard not in present:  # such as a path to a file elsewhere
            raise CheckpointError(f"{file_name} names the file {shard}, which is not in {directory}; download it.")
        tensors |= read_tensor_file(directory / shard)
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file.name != shard:
            raise CheckpointError(f"{file_name} says that {name} is in {shard}, but it is not; download both again.")
    return tensors


def read_tensor_file(path: Path) -> dict[str, LazyTensor]:
    """List the tensors of one safetensors or PyTorch file by name, without reading their values."""
    if path.suffix != ".safetensors":
        return _read_pytorch_file(path)

    def load(name: str) -> torch.Tensor:
        # Opened each time: what was read of a mapped file counts as memory until the last of its tensors is dropped.
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)

    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                view = file.get_slice(name)
                dtype = SAFETENSORS_DTYPES.get(view.get_dtype())
                if dtype is None:
                    raise CheckpointError(
                        f"{name} in {path.name} has the dtype {view.get_dtype()}, which is not supported; save it in "
                        f"another one, such as bfloat16."
                    )
                tensors[name] = LazyTensor(name, path, dtype, tuple(view.get_shape()), partial(load, name))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path.name} is damaged or incomplete ({error}); download it again.") from error
    return tensors


def _read_pytorch_file(path: Path) -> dict[str, LazyTensor]:
    state_dict, num_bytes_read = _open_pytorch_file(path), 0

    def load(name: str) -> torch.Tensor:
        nonlocal state_dict, num_bytes_read
        # Opened again now and then: opening it for each tensor would take long.
        if num_bytes_read > REOPEN_AFTER:
            state_dict, num_bytes_read = _open_pytorch_file(path), 0
        num_bytes_read += state_dict[name].nbytes
        return state_dict[name]

    return {
        name: LazyTensor(name, path, tensor.dtype, tuple(tensor.shape), partial(load, name))
        for name, tensor in state_dict.items()
    }


def _open_pytorch_file(path: Path) -> dict[str, torch.Tensor]:
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, OSError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(
            f"{path.name} is damaged, or would run code when it is loaded ({reason}); download it again, or ask its "
            f"authors for safetensors."
        ) from error
    if not isinstance(state_dict, dict) or not all(isinstance(value, torch.Tensor) for value in state_dict.values()):
        raise CheckpointError(f"{path.name} holds more than tensors by name; give the model's weights.")
    return state_dict


def resolve_checkpoint(
    path_or_id: str | Path, allow_patterns: tuple[str, ...] = CHECKPOINT_FILES, **hub_kwargs: Any
) -> Path:
    """Return a local directory as it is, or download a Hub repository. `hub_kwargs` are of `snapshot_download`."""
    if is_directory(path_or_id):
        return Path(path_or_id)
    try:
        return Path(snapshot_download(str(path_or_id), allow_patterns=list(allow_patterns), **hub_kwargs))
    except Exception as error:
        # Invalid, offline, not found, gated, no token: huggingface_hub says which, in one of many exceptions.
        raise CheckpointError(
            f"{path_or_id} is neither a directory nor the id of a Hub repository that can be downloaded: {error}"
        ) from error


def is_directory(path_or_id: str | Path) -> bool:
    """
    Whether a path or Hub id is a directory with readable files, and otherwise an id that may exist on the Hub.

    An id has the form `user/name`. If there is a local file or directory `user`, it is a path, so that a mistyped path
    is never looked up on the Hub.

    Raises:
        CheckpointError: If it is a path and there is no such directory, or one of its files is damaged.
    """
    text, path = str(path_or_id), Path(path_or_id)
    if not text.strip():
        raise CheckpointError("Got an empty path; give a directory or the id of a Hub repository.")
    if path.is_dir():
        _check_files(path)
        return True
    if path.exists():
        raise CheckpointError(f"{text} is a file; give the directory of a checkpoint.")
    user, _, name = text.partition("/")
    try:
        validate_repo_id(text)
    except HFValidationError:
        name = ""
    if not name:
        raise CheckpointError(f"{text} is neither a directory nor the id of a Hub repository, such as user/name.")
    if Path(user).exists():
        raise CheckpointError(
            f"There is no directory {text}. It is not looked up on the Hub because {user} exists here; for the "
            f"repository, run the command in another directory."
        )
    return False


def _check_files(directory: Path) -> None:
    """Read what Transformers and peft read, which do not name a damaged file. Of weights, headers are read."""
    for name in JSON_FILES:
        if os.path.lexists(directory / name):
            read_json(directory / name)
    for file in (*sorted(directory.glob("*.jinja")), directory / "merges.txt", directory / "tokenizer.model"):
        try:
            is_empty = os.path.lexists(file) and not file.read_bytes()
            if file.suffix == ".jinja":
                file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file} cannot be read ({error}); download it again.") from error
        if is_empty:
            raise CheckpointError(f"{file} is empty; download it again.")
    read_tensors(directory)
    if os.path.lexists(adapter := directory / "adapter_model.safetensors"):
        read_tensor_file(adapter)


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """
    Hold the lock of an output, so that no two runs write it at the same time.

    A process that is killed releases it. SIGTERM ends the block like SIGINT, unless something else handles it.

    Raises:
        CheckpointError: If another run holds the lock, or the output cannot be written.
    """
    output = output.resolve()
    with _sigterm_raises():
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            # Beside the output, or inside where only that can be written, such as a mounted directory.
            directory = output.parent if os.access(output.parent, os.W_OK) else output
            lock_file = directory / f".{output.name}.lock"
            lock = FileLock(lock_file, timeout=0).acquire()
        except Timeout:
            raise CheckpointError(f"Another run is writing {output}; wait for it, or give another output.") from None
        except OSError as error:
            reason = error.strerror or error
            raise CheckpointError(f"{output} cannot be written ({reason}); give another output.") from error
        with lock:
            try:
                yield
            finally:
                # While it is held: a run that has opened the file already is refused, or opens it anew.
                with suppress(PermissionError):  # Windows deletes no open file, but filelock does it there
                    lock_file.unlink()


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Raise `SystemExit` on SIGTERM, which by default ends a process without any cleaning up."""
    is_main = threading.current_thread() is threading.main_thread()  # others may not set handlers
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def output_directory(output: Path) -> Iterator[Path]:
    """
    Yield a temporary directory, which becomes `output` when the block succeeds and is removed otherwise.

    Raises:
        CheckpointError: If `output` exists and is not an empty directory, or if another run is writing it. Nothing is
            ever overwritten.
    """
    if not output.name:
        raise CheckpointError(f"{str(output)!r} cannot be created; give the path of a new output directory.")
    output = output.resolve()
    incomplete = output.parent / f".{output.name}.incomplete"
    with locked(output):
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise CheckpointError(f"{output} exists already; remove it or give another output directory.")
        # What a killed run left behind is of no use: nothing tells which of its files are complete.
        shutil.rmtree(incomplete, ignore_errors=True)
        try:
            incomplete.mkdir()
            yield incomplete
            os.replace(incomplete, output)
        except BaseException:
            shutil.rmtree(incomplete, ignore_errors=True)
            raise


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file that is complete when it appears, a text in UTF-8."""
    temporary = path.with_name(f".{path.name}.incomplete")
    temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    os.replace(temporary, path)


def write_tensors(directory: Path, tensors: dict[str, LazyTensor], max_shard_size: int | str) -> None:
    """
    Write tensors as `model.safetensors`, or as shards and their index, with one shard in memory at a time.

    A shard has at most `max_shard_size` bytes, which may be given as `"1GB"`. A larger tensor gets its own.
    """
    num_bytes = sum(tensor.num_bytes for tensor in tensors.values())
    required = num_bytes + 2**26  # for tokenizer, configurations and model card
    if (free := shutil.disk_usage(directory).free) < required:
        raise CheckpointError(
            f"{directory} requires {required / 2**30:.1f} GiB, but its disk has only {free / 2**30:.1f} GiB free; "
            f"give an output on another disk."
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
        (directory / WEIGHT_FILES[0]).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(path: Path, tensors: dict[str, LazyTensor]) -> None:
    shard: dict[str, torch.Tensor] = {}
    for name, lazy in tensors.items():
        tensor = lazy.load()
        # Safetensors refuses tensors that share memory: one that is written under two names.
        is_shared = any(tensor.data_ptr() == other.data_ptr() for other in shard.values())
        shard[name] = tensor.clone() if is_shared else tensor.contiguous()
    try:
        save_file(shard, path, metadata={"format": "pt"})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path.name} cannot be written: {error}") from error
