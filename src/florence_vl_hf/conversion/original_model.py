# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""What an original checkpoint is, told by its small files: configuration, tokenizer and picture settings."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..modeling import FlorenceVLConfig, FlorenceVLForConditionalGeneration
from ..processing import FlorenceVLProcessor
from .errors import CheckpointError
from .key_mapping import ORIGINAL_TOWER, to_first_release
from .original_config import (
    TowerSettings,
    check_is_florence_vl,
    text_config_from_original,
    tower_settings_from_folder,
    tower_settings_from_tensors,
)
from .original_processor import add_image_token, build_processor, fitting_chat_template, load_original_tokenizer
from .stored_tensors import StoredTensor, find_tensors, read_json


# Where an original checkpoint keeps its tower after pretraining, beside the shards.
TOWER_FOLDER = "vision_tower"


@dataclass
class OriginalModel:
    """An original checkpoint, translated but for its weights."""

    original: dict[str, Any]
    config: FlorenceVLConfig
    tower: TowerSettings
    tokenizer: PreTrainedTokenizerBase
    num_original_rows: int

    @property
    def fitting_chat_template(self) -> str:
        """The name of the conversation format that the model was finetuned on."""
        return fitting_chat_template(self.original, self.tokenizer)

    def build_processor(self, chat_template: str) -> FlorenceVLProcessor:
        """The processor of the model, with the conversation format that is named."""
        return build_processor(
            self.tower,
            self.tokenizer,
            self.config.num_image_tokens,
            do_pad=self.original.get("image_aspect_ratio") == "pad",
            chat_template=chat_template,
        )


def tower_folder(source: Path, vision_tower: Path | None = None) -> Path | None:
    """The folder of the checkpoint's Florence-2, if there is one."""
    if vision_tower is None and (source / TOWER_FOLDER / "config.json").is_file():
        return source / TOWER_FOLDER
    return vision_tower


def find_tower_tensors(folder: Path) -> dict[str, StoredTensor]:
    """List the tensors of a Florence-2 folder by their names in its first release, whichever layout it has."""
    tensors = {}
    for name, tensor in find_tensors(folder).items():
        mapped = to_first_release(name)
        if mapped is not None and mapped.transposed:
            tensor = replace(tensor, shape=tensor.shape[::-1], read=_transposed(tensor.read), offset=None)
        tensors[name if mapped is None else mapped.name] = tensor
    return tensors


def _transposed(read: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    return lambda: read().T


def read_original_model(
    source: Path,
    vision_tower: Path | None = None,
    image_feature_source: list[str] | None = None,
    stored: dict[str, StoredTensor] | None = None,
) -> OriginalModel:
    """
    Translate all of an original checkpoint but its weights, which are looked at only if nothing else tells the tower.

    Args:
        source (`Path`): Folder of the original checkpoint.
        vision_tower (`Path`, *optional*): Folder of its Florence-2, where `source` has none.
        image_feature_source (`list[str]`, *optional*): Instead of what the tower's configuration says.
        stored (`dict[str, StoredTensor]`, *optional*): The checkpoint's tensors, if they are listed already.

    Raises:
        CheckpointError: If it is no Florence-VL, or its files contradict each other.
    """
    original = read_json(source / "config.json")
    check_is_florence_vl(original, stored or {}, str(source))
    vision_tower = tower_folder(source, vision_tower)
    if vision_tower is not None:
        tower = tower_settings_from_folder(vision_tower)
    else:
        stored = find_tensors(source) if stored is None else stored
        tower = tower_settings_from_tensors(
            {name.removeprefix(ORIGINAL_TOWER): tensor for name, tensor in stored.items()}
        )
    tower.override_image_feature_source(image_feature_source)

    tokenizer = load_original_tokenizer(source)
    text_config = text_config_from_original(original)
    num_original_rows = text_config.vocab_size
    image_token_id, text_config.vocab_size = add_image_token(tokenizer, num_original_rows)
    try:
        config = FlorenceVLConfig(
            vision_config=tower.config,
            text_config=text_config,
            image_token_id=image_token_id,
            image_size=tower.image_size,
            image_feature_source=tower.image_feature_source,
            projector_depth=int(original["mm_projector_type"].removeprefix("mlp").removesuffix("x_gelu")),
            projector_hidden_act="gelu",
            architectures=[FlorenceVLForConditionalGeneration.__name__],
            dtype=original.get("torch_dtype"),
        )
    except ValueError as error:
        raise CheckpointError(f"The configuration of {source} contradicts itself: {error}") from error
    return OriginalModel(original, config, tower, tokenizer, num_original_rows)


__all__ = ["OriginalModel", "find_tower_tensors", "read_original_model", "tower_folder"]
