# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Mean features of images under any vision encoder, and of captions under a language model, kept on disk."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from ..conversion import CheckpointError, is_original, load_pretrained
from ..conversion.checkpoint_files import CHECKPOINT_FILES, read_json, resolve_checkpoint, write_file
from ..conversion.original_checkpoint import TOWER_DIRECTORY
from ..modeling import FlorenceVLConfig
from ..processing.text import to_utf8
from .extraction import extract_features, is_adapter, load_vision_encoder


# Returns means over the tokens of each input, of shape `(num_inputs, num_channels)`, by name of the feature.
Encode = Callable[[list[Any]], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Encoder:
    """
    A model that is loaded when something is not in the cache.

    Attributes:
        name (`str`): Its directory or Hub id, as given.
        key (`str`): Its directory in the cache, another one when the model changes.
        load (`Callable`): Loads the model, and returns what encodes a batch.
    """

    name: str
    key: str
    load: Callable[[], Encode]


def encode_items(
    encoder: Encoder,
    items: dict[str, str],
    cache: str | Path,
    batch_size: int,
    read: Callable[[str], Any] = str,
    errors: dict[str, str] | None = None,
) -> dict[str, dict[str, torch.Tensor]]:
    """
    Compute the mean features of images or captions, or read them from the cache.

    Batches depend on `items` alone, so that a resumed run gives the same features as one that was not interrupted.

    Args:
        encoder (`Encoder`): The model.
        items (`dict[str, str]`): Paths of images, or captions, by their digests.
        cache (`str` or `Path`): Directory of features.
        batch_size (`int`): Number of items per batch.
        read (`Callable`, *optional*): Makes an item an input of the encoder, or raises a `ValueError`.
        errors (`dict[str, str]`, *optional*): Gets the messages of items that cannot be read, by digest.

    Returns:
        `dict`: Features by digest of the item and by name, each of shape `(num_channels,)`, in float32 on the CPU.
    """
    directory, encode, features = Path(cache) / encoder.key, None, {}
    directory.mkdir(parents=True, exist_ok=True)
    digests = list(items)
    with tqdm(total=len(digests), desc=f"Features of {encoder.name}") as progress:
        for start in range(0, len(digests), batch_size):
            batch = digests[start : start + batch_size]
            known = {digest: saved for digest in batch if (saved := _load_saved(directory, digest))}
            inputs = {}
            for digest in batch if len(known) < len(batch) else []:
                try:
                    inputs[digest] = read(items[digest])
                except ValueError as error:
                    (errors if errors is not None else {})[digest] = str(error)
            if not inputs.keys() <= known.keys():
                encode = encode or encoder.load()
                encoded = {name: values.float().cpu() for name, values in encode(list(inputs.values())).items()}
                if not all(values.isfinite().all() for values in encoded.values()):
                    raise ValueError(f"Features of {encoder.name} are not finite; use --dtype float32.")
                for i, digest in enumerate(inputs):
                    known[digest] = {name: values[i].clone() for name, values in encoded.items()}
                    write_file(directory / f"{digest}.safetensors", save(known[digest]))
            features.update(known)
            progress.update(len(batch))
    return features


def _load_saved(directory: Path, digest: str) -> dict[str, torch.Tensor] | None:
    try:
        return load_file(directory / f"{digest}.safetensors")
    except (FileNotFoundError, SafetensorError):  # a damaged file is replaced
        return None


def digest_of(item: str | Path) -> str:
    """Hash a text, or the content of a file. Of a file that cannot be read, the path: reading it says why."""
    try:
        content = item.read_bytes() if isinstance(item, Path) else to_utf8(item).encode()
    except OSError:
        content = os.fsencode(item)
    return hashlib.sha256(content).hexdigest()


def florence_encoder(path_or_id: str | Path, dtype: torch.dtype | None, device: str) -> Encoder:
    """Find the encoder of V and V't of each prompt, of a Florence-VL or Florence-2."""
    directory = resolve_checkpoint(path_or_id)

    def load() -> Encode:
        vision_encoder = load_vision_encoder(directory, dtype=dtype, device=device)

        def encode(images: list[Image.Image]) -> dict[str, torch.Tensor]:
            features = [
                of_image.tokens for of_image in extract_features(vision_encoder, images, batch_size=len(images))
            ]
            return {name: torch.stack([tokens[name].mean(dim=0) for tokens in features]) for name in features[0]}

        return encode

    return Encoder(str(path_or_id), _model_key(directory, "vision", dtype), load)


def image_encoder(path_or_id: str | Path, dtype: torch.dtype | None, device: str) -> Encoder:
    """Find any encoder that `AutoModel` loads, or the vision part of a model for images and text, such as CLIP."""
    directory = resolve_checkpoint(path_or_id)
    try:
        image_processor = AutoImageProcessor.from_pretrained(directory)
    except Exception as error:  # Transformers raises many types
        raise ValueError(f"{path_or_id} cannot be loaded as an image encoder: {error}") from error

    def load() -> Encode:
        loaded = AutoModel.from_pretrained(directory, dtype=dtype or "auto", device_map=device).eval()
        vision_model = getattr(loaded, "vision_model", loaded)
        if vision_model is loaded and loaded.main_input_name != "pixel_values":
            raise ValueError(f"{path_or_id} is a {loaded.config.model_type}, expected an encoder of images alone.")

        @torch.inference_mode()
        def encode(images: list[Image.Image]) -> dict[str, torch.Tensor]:
            inputs = image_processor(images, return_tensors="pt").to(loaded.device, dtype=loaded.dtype)
            # (num_images, num_tokens, num_channels), or a feature map (num_images, num_channels, height, width)
            hidden_states = vision_model(**inputs).last_hidden_state.float()
            return {"tokens": hidden_states.mean(dim=1 if hidden_states.ndim == 3 else (2, 3))}

        return encode

    return Encoder(str(path_or_id), _model_key(directory, "vision", dtype), load)


def language_encoder(path_or_id: str | Path, dtype: torch.dtype | None, device: str) -> Encoder:
    """Find the encoder of captions: a language model, or that of a Florence-VL."""
    directory = resolve_checkpoint(path_or_id)
    model_type = None if is_adapter(directory) else read_json(directory / "config.json").get("model_type")
    if model_type == "florence2":
        raise CheckpointError(f"{path_or_id} has no language model; give the one that reads the captions as --llm.")
    is_florence_vl = is_adapter(directory) or model_type == FlorenceVLConfig.model_type or is_original(directory)

    def load() -> Encode:
        settings: dict[str, Any] = {"dtype": dtype or "auto", "device_map": device}
        if is_florence_vl:
            loaded, processor = load_pretrained(directory, **settings)
            model, tokenizer = loaded.model.language_model.eval(), processor.tokenizer
        else:
            model = AutoModel.from_pretrained(directory, **settings).eval()
            tokenizer = AutoTokenizer.from_pretrained(directory)
            tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        settings = {"padding": True, "padding_side": "right", "return_special_tokens_mask": True}
        max_length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        settings |= {"truncation": True, "max_length": max_length}

        @torch.inference_mode()
        def encode(captions: list[str]) -> dict[str, torch.Tensor]:
            inputs = tokenizer(list(map(to_utf8, captions)), return_tensors="pt", **settings).to(model.device)
            is_counted = (inputs["attention_mask"] * (1 - inputs.pop("special_tokens_mask")))[..., None]
            outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
            hidden_states = outputs.last_hidden_state.float()  # (num_captions, num_tokens, hidden_size)
            return {"tokens": (hidden_states * is_counted).sum(dim=1) / is_counted.sum(dim=1)}

        return encode

    return Encoder(str(path_or_id), _model_key(directory, "text", dtype), load)


def _model_key(directory: Path, part: str, dtype: torch.dtype | None) -> str:
    """Name a model by the content of its JSON files, and by size and time of the others, which are large."""
    digest = hashlib.sha256(f"{part} {dtype}".encode())
    parents = (directory, directory / TOWER_DIRECTORY)
    for file in sorted({file for parent in parents for pattern in CHECKPOINT_FILES for file in parent.glob(pattern)}):
        status = file.stat()
        content = file.read_bytes() if file.suffix == ".json" else f"{status.st_size} {status.st_mtime_ns}".encode()
        digest.update(f"\n{file.relative_to(directory)} ".encode() + hashlib.sha256(content).digest())
    return f"{directory.name}-{part}-{digest.hexdigest()[:16]}"


__all__ = ["Encoder", "digest_of", "encode_items", "florence_encoder", "image_encoder", "language_encoder"]
