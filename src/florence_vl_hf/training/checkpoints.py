# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Which checkpoint of a run that was cut off can be gone on from."""

import json
import re
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging


logger = logging.get_logger(__name__)

# What torch.distributed.checkpoint writes into a folder of shards when all of them are there.
SHARDS_METADATA = ".metadata"


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """
    The newest checkpoint of a run that was saved to its end, or `None`.

    A run may be killed while it saves, and what it leaves then looks like a checkpoint to `get_last_checkpoint`.

    Args:
        output_dir (`str` or `Path`): Of `TrainingArguments`; it may not exist yet.
    """
    steps = {}
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name)
        if match and folder.is_dir():
            steps[int(match[1])] = folder
    for step in sorted(steps, reverse=True):
        if _is_complete(steps[step], step):
            return steps[step]
        logger.warning(f"{steps[step]} was not saved to its end; it is passed over.")
    return None


def _is_complete(folder: Path, step: int) -> bool:
    # `Trainer` writes its state last, when this process has written everything else.
    try:
        state = json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    # Other processes write beside it, and may have been slower.
    return (
        state.get("global_step") == step
        and all(_is_whole_safetensors(file) for file in folder.rglob("*.safetensors"))
        and all(zipfile.is_zipfile(file) for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.rglob(pattern))
        and all((shards.parent / SHARDS_METADATA).is_file() for shards in folder.rglob("*.distcp"))
        and _has_every_random_state(folder)
    )


def _is_whole_safetensors(file: Path) -> bool:
    try:
        with safe_open(file, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _has_every_random_state(folder: Path) -> bool:
    """Whether no process between the first and the last is missing among those that saved their random state."""
    ranks = sorted(int(file.stem.rpartition("_")[2]) for file in folder.glob("rng_state_*.pth"))
    return ranks == list(range(len(ranks)))


__all__ = ["last_complete_checkpoint"]
