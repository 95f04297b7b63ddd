# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Find the last complete checkpoint of a training run."""

import json
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging


logger = logging.get_logger(__name__)


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """
    Return the newest checkpoint that is complete, or `None`.

    `get_last_checkpoint` of Transformers also returns one that was being saved when the run was killed.

    Args:
        output_dir (`str` or `Path`): As in `TrainingArguments`. It may not exist yet.
    """
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    names = {path.name.removeprefix(prefix): path for path in Path(output_dir).glob(f"{prefix}*") if path.is_dir()}
    steps = {int(step): path for step, path in names.items() if step.isdecimal()}
    for step, directory in sorted(steps.items(), reverse=True):
        if _is_complete(directory, step):
            return directory
        logger.warning(f"{directory} is incomplete; skipping it.")
    return None


def _is_complete(directory: Path, step: int) -> bool:
    try:
        # The main process writes its state last, after everything else of its own.
        state = json.loads((directory / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        for file in directory.rglob("*.safetensors"):
            with safe_open(file, framework="pt"):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    # Other processes write at the same time, and may be slower.
    ranks = sorted(int(file.stem.rpartition("_")[2]) for file in directory.glob("rng_state_*.pth"))
    return (
        state.get("global_step") == step
        and all(zipfile.is_zipfile(file) for suffix in ("bin", "pt", "pth") for file in directory.rglob(f"*.{suffix}"))
        # torch.distributed.checkpoint writes this file when all shards are there.
        and all((shard.parent / ".metadata").is_file() for shard in directory.rglob("*.distcp"))
        and ranks == list(range(len(ranks)))
    )
