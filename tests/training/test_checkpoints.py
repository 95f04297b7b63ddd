# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from florence_vl_hf.training.checkpoints import last_complete_checkpoint


def write_checkpoint(directory: Path, step: int) -> Path:
    checkpoint = directory / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    save_file({"weight": torch.ones(4)}, checkpoint / "model.safetensors")
    for name in ("optimizer.pt", "rng_state_0.pth", "rng_state_1.pth"):
        torch.save({"numbers": torch.ones(4)}, checkpoint / name)
    (checkpoint / "pytorch_model_fsdp_0").mkdir()
    for name in ("__0_0.distcp", ".metadata"):
        (checkpoint / "pytorch_model_fsdp_0" / name).write_bytes(b"x")
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return checkpoint


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


DAMAGES = {
    "no state": lambda directory: (directory / "trainer_state.json").unlink(),
    "half a state": lambda directory: cut(directory / "trainer_state.json"),
    "half the weights": lambda directory: cut(directory / "model.safetensors"),
    "half an optimizer": lambda directory: cut(directory / "optimizer.pt"),
    "empty random state": lambda directory: (directory / "rng_state_1.pth").write_bytes(b""),
    "missing random state": lambda directory: (directory / "rng_state_0.pth").unlink(),
    "shards without their metadata": lambda directory: (directory / "pytorch_model_fsdp_0" / ".metadata").unlink(),
    "state of another step": lambda directory: (directory / "trainer_state.json").write_text('{"global_step": 1}'),
}


def test_the_newest_by_number(tmp_path):
    for step in (5, 900, 1000):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-of-mine").mkdir()
    (tmp_path / "checkpoint-2000").touch()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-1000"


@pytest.mark.parametrize("damage", DAMAGES)
def test_incomplete_checkpoints_are_skipped(damage, tmp_path, caplog):
    complete, incomplete = write_checkpoint(tmp_path, 2), write_checkpoint(tmp_path, 4)
    assert last_complete_checkpoint(tmp_path) == incomplete
    DAMAGES[damage](incomplete)
    assert last_complete_checkpoint(tmp_path) == complete
    assert "checkpoint-4 is incomplete; skipping it" in caplog.text


def test_no_checkpoint(tmp_path):
    assert last_complete_checkpoint(tmp_path) is None
    assert last_complete_checkpoint(tmp_path / "not-yet") is None
