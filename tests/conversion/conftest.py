# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Original checkpoints that tests may damage."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ..conftest import FIXTURES, Golden


LLAMA = Golden(FIXTURES / "llama-small")
PHI = Golden(FIXTURES / "phi-small")


@pytest.fixture
def llama_copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(LLAMA.checkpoint, tmp_path / "original"))


@pytest.fixture
def phi_copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PHI.checkpoint, tmp_path / "original-phi"))


def all_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory's safetensors files."""
    return {
        name: tensor for shard in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(shard).items()
    }


def edit_config(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


def edit_shard(
    directory: Path, edit: Callable[[dict[str, torch.Tensor]], Any], number: int = 1, with_index: bool = True
) -> None:
    """Change the tensors of a shard, and the index with them."""
    shard = directory / f"model-0000{number}-of-00002.safetensors"
    tensors = load_file(shard)
    before = set(tensors)
    edit(tensors)
    save_file(tensors, shard, metadata={"format": "pt"})
    if with_index:
        index_file = directory / "model.safetensors.index.json"
        index = json.loads(index_file.read_text())
        for name in before - set(tensors):
            del index["weight_map"][name]
        index["weight_map"] |= dict.fromkeys(tensors, shard.name)
        index_file.write_text(json.dumps(index))


def remove_weights(directory: Path) -> None:
    for file in directory.glob("*.safetensors*"):
        file.unlink()
