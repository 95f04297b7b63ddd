# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Recorded references: what the original code computed from a few images, as `record_reference.py` writes it."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import type_validator

from ..modeling import FlorenceVLConfig
from .checkpoint_files import CheckpointError, LazyTensor, read_json, read_tensor_file


# The original's placeholder of one image among token ids.
IMAGE_TOKEN_INDEX = -200
# Of recorded logits, every fifth entry of the vocabulary is kept.
LOGITS_STRIDE = 5
# Runs in the original's environment, without this package.
RECORD_SCRIPT = Path(__file__).with_name("record_reference.py")
Ids = list[int]
# Recorded tensors with one entry per image, and their numbers of dimensions.
IMAGE_TENSORS = {"pixel_values": 4, "davit": 3, "image_feature": 3, "encoder_last_hidden_state": 3, "projected": 3}
# Lists of the record, and the types of what their entries hold.
RECORD_TYPES: dict[str, dict[str, Any]] = {
    "dialogs": {"conversations": list[dict[str, str]], "train_input_ids": Ids | None, "chat_input_ids": Ids | None},
    "forwards": {
        "rows": list[dict[str, Any]],
        "input_ids": list[Ids],
        "attention_mask": list[Ids] | None,
        "labels": list[Ids] | None,
        "loss": float | None,
    },
    "generations": {"image": str, "chat_input_ids": Ids, "generated_ids": Ids},
}


@dataclass(frozen=True)
class Reference:
    """Recorded tensors, paths of the images in their order, and the lists of `RECORD_TYPES`. Each may be empty."""

    tensors: dict[str, LazyTensor]
    images: list[Path]
    record: dict[str, list[dict[str, Any]]]

    def load(self, name: str) -> torch.Tensor | None:
        return self.tensors[name].load() if name in self.tensors else None


def read_reference(path: Path) -> Reference:
    """
    Read recorded tensors, and the JSON file of the same name beside them if there is one.

    Raises:
        CheckpointError: If a file is missing or damaged, or the record lacks an entry or has one of a wrong type.
    """
    if not path.is_file():
        raise CheckpointError(f"There is no reference {path}; record one with `python {RECORD_SCRIPT}`.")
    tensors, record_file = read_tensor_file(path), path.with_suffix(".json")
    raw = read_json(record_file) if os.path.lexists(record_file) else {}
    images, record = raw.get("images", []), {name: raw.get(name, []) for name in RECORD_TYPES}
    try:
        type_validator("images", images, list[str])
        for name, types in RECORD_TYPES.items():
            type_validator(name, record[name], list[dict[str, Any]])
            for entry in record[name]:
                for key, expected_type in types.items():
                    type_validator(f"{name}.{key}", entry.get(key), expected_type)
        for row in (row for forward in record["forwards"] for row in forward["rows"]):
            type_validator("forwards.rows.image", row.get("image"), str)
        for turn in (turn for dialog in record["dialogs"] for turn in dialog["conversations"]):
            type_validator("dialogs.conversations", (turn.get("from"), turn.get("value")), tuple[str, str])
    except TypeError as error:
        raise CheckpointError(f"{record_file} is not a record of the original: {error}; record it again.") from error
    for name, tensor in tensors.items():
        num_dimensions = 3 if name.endswith(".logits") else IMAGE_TENSORS.get(name, len(tensor.shape))
        if len(tensor.shape) != num_dimensions:
            raise CheckpointError(
                f"{tensor} has shape {tensor.shape}, expected {num_dimensions} dimensions; record it again."
            )
    if outside := [name for name in images if Path(name).name != name]:
        raise CheckpointError(f"`images` of {record_file} holds {outside[0]!r}, expected the names of files.")
    return Reference(tensors, [path.parent / "images" / name for name in images], record)


def expand_image_tokens(token_ids: list[int], config: FlorenceVLConfig) -> list[int]:
    """Replace each of the original's placeholders by the model's image tokens."""
    image_tokens, vocab_size = [config.image_token_id] * config.num_image_tokens, config.text_config.vocab_size
    expanded = [token for i in token_ids for token in (image_tokens if i == IMAGE_TOKEN_INDEX else [i])]
    if unknown := [i for i in expanded if not 0 <= i < vocab_size]:
        raise CheckpointError(
            f"The reference has token id {unknown[0]}, but the model has only {vocab_size} tokens; give the reference "
            f"of the model's own original."
        )
    return expanded


__all__ = ["IMAGE_TOKEN_INDEX", "LOGITS_STRIDE", "RECORD_SCRIPT", "Reference", "expand_image_tokens", "read_reference"]
