# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Check of the model that a training run or a merge starts from."""

from pathlib import Path

from transformers import PreTrainedConfig

from ..conversion import CheckpointError, is_original
from ..modeling import FlorenceVLConfig


def check_model_type(path_or_id: str | Path) -> None:
    """Raise a `CheckpointError` if a directory or Hub repository has no Florence-VL, in either layout."""
    model_type = PreTrainedConfig.get_config_dict(path_or_id)[0].get("model_type")
    if model_type != FlorenceVLConfig.model_type and not is_original(path_or_id):
        raise CheckpointError(
            f"{path_or_id} has model type {model_type!r}, expected {FlorenceVLConfig.model_type!r}; "
            f"`florence-vl assemble` builds a Florence-VL from a Florence-2 and a language model."
        )
