# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""The model that a training run or a merge starts from."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedConfig

from ..conversion import CheckpointError, convert
from ..conversion.original_config import TEXT_MODEL_TYPES
from ..modeling import FlorenceVLConfig, FlorenceVLForConditionalGeneration
from ..processing import FlorenceVLProcessor, load_chat_template


def check_model_type(path_or_id: str | Path) -> None:
    """Raise a `CheckpointError` if a directory or Hub repository has no Florence-VL, in either layout."""
    model_type = PreTrainedConfig.get_config_dict(path_or_id)[0].get("model_type")
    if model_type != FlorenceVLConfig.model_type and not is_original(path_or_id):
        raise CheckpointError(
            f"{path_or_id} has model type {model_type!r}, expected {FlorenceVLConfig.model_type!r}; "
            f"`florence-vl assemble` builds a Florence-VL from a Florence-2 and a language model."
        )


# TEMP: everything below is replaced by `..conversion`'s functions of the same names.
def is_original(path_or_id: str | Path) -> bool:
    return PreTrainedConfig.get_config_dict(path_or_id)[0].get("model_type") in TEXT_MODEL_TYPES


def load_original(path_or_id: str | Path, **kwargs: Any) -> tuple[Any, FlorenceVLProcessor]:
    with TemporaryDirectory() as temporary:
        convert(path_or_id, Path(temporary) / "converted")
        loaded, processor = load_pretrained(Path(temporary) / "converted", **kwargs)
    (loaded[0] if isinstance(loaded, tuple) else loaded).config.name_or_path = str(path_or_id)
    return loaded, processor


def load_pretrained(
    path_or_id: str | Path, *, chat_template: str | None = None, **kwargs: Any
) -> tuple[Any, FlorenceVLProcessor]:
    if is_original(path_or_id):
        return load_original(path_or_id, chat_template=chat_template, **kwargs)
    fields = {name: kwargs.pop(name) for name in ("fusion_strategy", "fusion_features") if name in kwargs}
    config = FlorenceVLConfig.from_dict(FlorenceVLConfig.from_pretrained(path_or_id).to_dict() | fields)
    processor = FlorenceVLProcessor.from_pretrained(path_or_id)
    loaded = FlorenceVLForConditionalGeneration.from_pretrained(path_or_id, config=config, **kwargs)
    processor.num_image_tokens = config.num_image_tokens
    if chat_template is not None:
        processor.chat_template = load_chat_template(chat_template, processor.tokenizer, processor.image_token)
    return loaded, processor
