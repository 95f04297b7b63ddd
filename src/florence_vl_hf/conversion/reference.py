# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Recorded references: what the original code computed from a few images, as `record_reference.py` writes it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..modeling import FlorenceVLConfig
from .checkpoint_files import CheckpointError, LazyTensor, read_json, read_tensor_file


# The original's placeholder of one image among token ids.
IMAGE_TOKEN_INDEX = -200
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
    """Recorded tensors, and the record of what the original was asked: a dict of lists, possibly empty."""

    tensors: dict[str, LazyTensor]
    record: dict[str, Any]
    image_directory: Path

    def load(self, name: str) -> torch.Tensor | None:
        return self.tensors[name].load() if name in self.tensors else None

    def entries(self, name: str) -> list[Any]:
        return self.record.get(name, [])


def read_reference(path: Path) -> Reference:
    """
    Read recorded tensors, and the JSON file of the same name beside them if there is one.

    Raises:
        CheckpointError: If a file is missing or damaged, or tensors and record do not match.
    """
    if not path.is_file():
        raise CheckpointError(f"There is no reference {path}; record one with `python {RECORD_SCRIPT}`.")
    record_file = path.with_suffix(".json")
    record = read_json(record_file) if record_file.is_file() else {}
    reference = Reference(read_tensor_file(path), record, path.parent / "images")
    for name, keys in RECORD_KEYS.items():
        entries = reference.entries(name)
        if not isinstance(entries, list) or not all(isinstance(e, dict) and keys <= e.keys() for e in entries):
            raise CheckpointError(
                f"`{name}` of {record_file} is not a list of entries with {', '.join(sorted(keys))}; record it again."
            )
    images = reference.entries("images")
    if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
        raise CheckpointError(f"`images` of {record_file} is not a list of file names; record it again.")
    if outside := [name for name in images if name in ("", ".", "..") or "/" in name or "\\" in name]:
        raise CheckpointError(f"{record_file} names the image {outside[0]!r}, which is not a file name; refused.")
    num_images = {name: reference.tensors[name].shape[0] for name in IMAGE_TENSORS if name in reference.tensors}
    num_images |= {"images": len(images)} if images else {}
    if len(set(num_images.values())) > 1:
        raise CheckpointError(
            f"{path.name} and {record_file.name} disagree about the number of images ({num_images}); record "
            f"both again."
        )
    return reference


def forward_inputs(forward: dict[str, Any], config: FlorenceVLConfig) -> tuple[dict[str, torch.Tensor], list[str]]:
    """
    Build model inputs from a recorded forward pass, with the model's image tokens for each placeholder.

    Args:
        forward (`dict`): Lists of `rows` and `input_ids`, optionally of `attention_mask` and `labels`.
        config (`FlorenceVLConfig`): Configuration of the model to run.

    Returns:
        `tuple[dict[str, torch.Tensor], list[str]]`: Right-padded inputs without pixel values, and the names of the
        images whose pixel values they need.
    """
    batch, images = [], []
    for i, (row, ids) in enumerate(zip(forward["rows"], forward["input_ids"], strict=True)):
        mask = forward["attention_mask"][i] if "attention_mask" in forward else [1] * len(ids)
        labels = forward["labels"][i] if "labels" in forward else [-100] * len(ids)
        tokens = []
        for token in zip(ids, mask, labels, strict=True):
            is_image = token[0] == IMAGE_TOKEN_INDEX
            tokens += [(config.image_token_id, 1, -100)] * config.num_image_tokens if is_image else [token]
        batch.append(tokens)
        images += [row["image"]] * ids.count(IMAGE_TOKEN_INDEX)
    length = max(map(len, batch))
    padded = torch.tensor([tokens + [(0, 0, -100)] * (length - len(tokens)) for tokens in batch])
    inputs = dict(zip(["input_ids", "attention_mask", "labels"], padded.unbind(-1), strict=True))
    if "labels" not in forward:
        del inputs["labels"]
    return inputs, images


__all__ = ["IMAGE_TOKEN_INDEX", "RECORD_SCRIPT", "Reference", "forward_inputs", "read_reference"]
