# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Recorded references: what the original code computed from a few images, as `record_reference.py` writes it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..modeling import FlorenceVLConfig
from .checkpoint_files import CheckpointError, LazyTensor, read_json, read_tensor_file


# The original's placeholder of one image among token ids.
IMAGE_TOKEN_INDEX = -200
# Of recorded logits, every fifth entry of the vocabulary is kept.
LOGITS_STRIDE = 5
# Recorded tensors with one entry per image.
IMAGE_TENSORS = ("pixel_values", "davit", "image_feature", "encoder_last_hidden_state", "projected")
# Lists of the record, and the keys that each of their entries must have.
RECORD_KEYS = {
    "dialogs": {"conversations"},
    "forwards": {"rows", "input_ids"},
    "generations": {"image", "chat_input_ids", "generated_ids"},
}
# Runs in the original's environment, without this package.
RECORD_SCRIPT = Path(__file__).with_name("record_reference.py")


@dataclass(frozen=True)
class Reference:
    """Recorded tensors, the images, and the lists of `RECORD_KEYS`. Each may be empty."""

    tensors: dict[str, LazyTensor]
    images: list[Path]
    record: dict[str, list[dict[str, Any]]]

    def load(self, name: str) -> torch.Tensor | None:
        return self.tensors[name].load() if name in self.tensors else None


def read_reference(path: Path) -> Reference:
    """
    Read recorded tensors, and the JSON file of the same name beside them if there is one.

    Raises:
        CheckpointError: If a file is missing or damaged, or tensors and record do not match.
    """
    if not path.is_file():
        raise CheckpointError(f"There is no reference {path}; record one with `python {RECORD_SCRIPT}`.")
    tensors, record_file = read_tensor_file(path), path.with_suffix(".json")
    raw = read_json(record_file) if record_file.is_file() else {}
    record = {name: raw.get(name, []) for name in RECORD_KEYS}
    for name, entries in record.items():
        keys = RECORD_KEYS[name]
        if not isinstance(entries, list) or not all(isinstance(e, dict) and keys <= e.keys() for e in entries):
            raise CheckpointError(
                f"`{name}` of {record_file} is not a list of entries with {', '.join(sorted(keys))}."
            )
    images = raw.get("images", [])
    if not isinstance(images, list) or any(name in ("", ".", "..") or set("/\\") & set(str(name)) for name in images):
        raise CheckpointError(f"`images` of {record_file} is not a list of file names.")
    num_images = {name: tensors[name].shape[:1] for name in IMAGE_TENSORS if name in tensors}
    num_images |= {"images": (len(images),)} if images else {}
    if len(set(num_images.values())) > 1:
        raise CheckpointError(f"{path} and its JSON file disagree about the number of images ({num_images}).")
    return Reference(tensors, [path.parent / "images" / str(name) for name in images], record)


def forward_inputs(forward: dict[str, Any], config: FlorenceVLConfig) -> tuple[dict[str, torch.Tensor], list[str]]:
    """
    Build the inputs of a recorded forward pass, with the model's image tokens for each placeholder.

    Returns:
        `tuple[dict[str, torch.Tensor], list[str]]`: Right-padded `input_ids`, `attention_mask` and, if recorded,
        `labels`, each of shape `(batch_size, sequence_length)`; and the names of the images in order.
    """
    counts, images = [], []
    for row, ids in zip(forward["rows"], forward["input_ids"], strict=True):
        counts.append(torch.tensor([config.num_image_tokens if i == IMAGE_TOKEN_INDEX else 1 for i in ids]))
        images += [row["image"]] * ids.count(IMAGE_TOKEN_INDEX)
    forward = {"attention_mask": [[1] * len(ids) for ids in forward["input_ids"]]} | forward
    inputs = {}
    for name, padding in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
        if name in forward:
            rows = [torch.tensor(row).repeat_interleave(n) for row, n in zip(forward[name], counts, strict=True)]
            inputs[name] = pad_sequence(rows, batch_first=True, padding_value=padding)
    inputs["input_ids"][inputs["input_ids"] == IMAGE_TOKEN_INDEX] = config.image_token_id
    return inputs, images


__all__ = ["IMAGE_TOKEN_INDEX", "LOGITS_STRIDE", "RECORD_SCRIPT", "Reference", "forward_inputs", "read_reference"]
