# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Features of images, V and V't of each prompt, from a whole model or from a vision encoder alone."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import BartTokenizer, BaseImageProcessor

from ..conversion import CheckpointError, is_original, load_pretrained, read_original
from ..conversion.checkpoint_files import LazyTensor, read_json, read_tensors, resolve_checkpoint
from ..conversion.config_checks import check_config, config_errors
from ..conversion.key_mapping import TOWER
from ..conversion.original_checkpoint import (
    TOWER_DIRECTORY,
    check_tensors,
    convert_names,
    read_config,
    read_tower_tensors,
)
from ..conversion.original_config import PUBLIC_IMAGE_FEATURE_SOURCE, tower_settings_from_directory
from ..conversion.original_processor import load_original_tokenizer, read_processor
from ..modeling import FlorenceVLConfig, FlorenceVLForConditionalGeneration, FlorenceVLModel
from ..modeling.configuration_florence_vl import IMAGE_FEATURE
from ..modeling.modeling_florence_vl import FlorenceVLPrompts, FlorenceVLVisionTower
from ..processing.images import read_pixels


# Tokenizes own prompts where a checkpoint has no tokenizer of BART, as no Florence-VL has.
PROMPT_TOKENIZER = "microsoft/Florence-2-large"


@dataclass(frozen=True)
class VisionEncoder:
    """
    A vision tower without a language model, as `load_vision_encoder` returns it.

    Attributes:
        config (`FlorenceVLConfig`): Its configuration. Of the language model's part, nothing is used.
        vision_tower (`FlorenceVLVisionTower`): The network.
        image_processor (`BaseImageProcessor`): Prepares its images.
        tokenizer (`str` or `Path`): Directory or Hub id of a Florence-2 or BART, whose tokenizer reads own prompts.
    """

    config: FlorenceVLConfig
    vision_tower: FlorenceVLVisionTower
    image_processor: BaseImageProcessor
    tokenizer: str | Path = PROMPT_TOKENIZER

    @classmethod
    def of(
        cls,
        model: FlorenceVLModel | FlorenceVLForConditionalGeneration,
        image_processor: Any = None,
        tokenizer: str | Path | None = None,
    ) -> "VisionEncoder":
        """Return the vision tower of a whole model, with the same weights in memory."""
        tower = (model.model if isinstance(model, FlorenceVLForConditionalGeneration) else model).vision_tower
        return cls(model.config, tower, image_processor, tokenizer or PROMPT_TOKENIZER)


@dataclass(frozen=True)
class ImageFeatures:
    """
    Features of one image.

    Attributes:
        tokens (`dict[str, torch.Tensor]`, each of shape `(num_feature_tokens, hidden_size)`): All tokens of V, under
            `"image"`, and of V't of each prompt, in float32 on the CPU.
        grid_size (`tuple[int, int]`): Height and width of the feature map, in positions.
        positions (`slice`): Which tokens are the positions of the feature map, row by row. The others are spatial
            averages. Empty if there are only averages.
    """

    tokens: dict[str, torch.Tensor]
    grid_size: tuple[int, int]
    positions: slice

    @property
    def maps(self) -> dict[str, torch.Tensor]:
        """Feature maps of shape `(height, width, hidden_size)` by name, without spatial averages."""
        return {
            name: tokens[self.positions].unflatten(0, self.grid_size)
            for name, tokens in self.tokens.items()
            if self.positions.stop > self.positions.start
        }


def available_device(device: str | torch.device) -> str | torch.device:
    """Return the device, an accelerator if there is one for `"auto"`."""
    if device != "auto":
        return device
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or "cpu"


def position_tokens(config: FlorenceVLConfig) -> slice:
    """Return which feature tokens are the positions of the feature map: the first source with one token for each."""
    sources = list(config.image_feature_source)
    start = next((i for i, source in enumerate(sources) if source != "spatial_avg_pool"), None)
    return slice(0, 0) if start is None else slice(start, start + config.feature_grid_size**2)


def extract_features(
    model: VisionEncoder | FlorenceVLModel | FlorenceVLForConditionalGeneration,
    images: torch.Tensor | Iterable[Image.Image | str | Path],
    prompts: Mapping[str, str | Sequence[int]] | None = None,
    *,
    image_processor: BaseImageProcessor | None = None,
    batch_size: int = 8,
) -> Iterator[ImageFeatures]:
    """
    Extract V and V't of every prompt of the model, whether they are fused or not, and of other prompts.

    Args:
        model (`VisionEncoder`, `FlorenceVLModel` or `FlorenceVLForConditionalGeneration`): The model.
        images (`torch.Tensor` or iterable of `PIL.Image`, `str` or `Path`): `pixel_values` of shape
            `(num_images, 3, image_size, image_size)`, or images or their paths, which are read batch by batch.
        prompts (mapping of `str` to `str` or token ids, *optional*): Prompts by name, beside the model's: texts, which
            the encoder's `tokenizer` reads, or ids of Florence-2's vocabulary, with special tokens.
        image_processor (`BaseImageProcessor`, *optional*): Prepares images. Required for images and a whole model.
        batch_size (`int`, *optional*, defaults to 8): Number of images per forward.

    Yields:
        `ImageFeatures`: Features of each image, in order.

    Raises:
        ValueError: If an image cannot be read or a prompt is invalid.
    """
    if not isinstance(model, VisionEncoder):
        if not isinstance(images, torch.Tensor) and image_processor is None:
            raise ValueError("`images` are no `pixel_values`; give the processor's `image_processor` too.")
        model = VisionEncoder.of(model, image_processor)
    tower = _with_all_prompts(model.vision_tower, model.config, tokenize_prompts(prompts or {}, model.tokenizer))
    return _extract(tower, model.config, images, image_processor or model.image_processor, batch_size)


def _extract(
    tower: FlorenceVLVisionTower,
    config: FlorenceVLConfig,
    images: torch.Tensor | Iterable[Image.Image | str | Path],
    image_processor: Any,
    batch_size: int,
) -> Iterator[ImageFeatures]:
    grid_size, positions, remaining = (config.feature_grid_size,) * 2, position_tokens(config), iter(images)
    while batch := list(islice(remaining, batch_size)):
        if isinstance(images, torch.Tensor):
            pixel_values = torch.stack(batch)
        else:
            opened = [image if isinstance(image, Image.Image) else open_image(image) for image in batch]
            pixel_values = image_processor(opened, return_tensors="pt").pixel_values
        with torch.inference_mode():
            features = tower(pixel_values.to(tower.device)).features
        features = {name: feature.float().cpu() for name, feature in features.items()}
        for i in range(len(batch)):
            yield ImageFeatures({name: feature[i] for name, feature in features.items()}, grid_size, positions)


def open_image(path: str | Path) -> Image.Image:
    """Read an image upright and in RGB, or raise a `ValueError` that names it."""
    if not os.path.isfile(path):
        raise ValueError(f"There is no image {path}; give the path of a file.")
    try:
        with Image.open(path) as image:
            return read_pixels(image)
    except Exception as error:  # Pillow's decoders raise many types
        raise ValueError(f"{path} cannot be read as an image ({' '.join(str(error).split())}); remove it.") from error


def tokenize_prompts(
    prompts: Mapping[str, str | Sequence[int]], tokenizer: str | Path = PROMPT_TOKENIZER
) -> dict[str, list[int]]:
    """Return the token ids of prompts by name, those of texts by the tokenizer of a Florence-2 or BART."""
    texts = {name: prompt for name, prompt in prompts.items() if isinstance(prompt, str)}
    token_ids = {name: list(map(int, prompt)) for name, prompt in prompts.items() if name not in texts}
    if texts:
        try:
            loaded = load_original_tokenizer(resolve_checkpoint(tokenizer, ("*.json", "*.txt")), BartTokenizer)
        except CheckpointError as error:
            raise CheckpointError(
                f"Own prompts require Florence-2's tokenizer; give its directory or Hub id as --tokenizer. {error}"
            ) from error
        token_ids |= {name: loaded(text).input_ids for name, text in texts.items()}
    return {name: token_ids[name] for name in prompts}


def _with_all_prompts(
    tower: FlorenceVLVisionTower, config: FlorenceVLConfig, prompt_token_ids: dict[str, list[int]]
) -> FlorenceVLVisionTower:
    """Return a tower of the same layers which reads images under all prompts of a configuration, and under others."""
    prompts = {**config.prompts, **{name: f"<{name}>" for name in prompt_token_ids}}
    settings = {
        "prompts": prompts,
        "prompt_token_ids": {**config.prompt_token_ids, **prompt_token_ids},
        "fusion_features": [IMAGE_FEATURE, *prompts],
    }
    complete = FlorenceVLConfig.from_dict({**config.to_dict(), **settings})
    with torch.device("meta"):
        reader = FlorenceVLVisionTower(complete)
    reader.backbone, reader.image_projector, reader.encoder = tower.backbone, tower.image_projector, tower.encoder
    reader.prompts = FlorenceVLPrompts(complete, complete.vision_config.text_config.pad_token_id).to(tower.device)
    return reader.eval()


def load_vision_encoder(
    path_or_id: str | Path,
    *,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    **hub_kwargs: Any,
) -> VisionEncoder:
    """
    Load the vision tower of a Florence-VL or of a Florence-2, without reading the weights of a language model.

    Args:
        path_or_id (`str` or `Path`): Directory or Hub id of a converted, trained or original Florence-VL, or of a
            Florence-2 in the layout of its first release or in Transformers'. An adapter is loaded with its base.
        tokenizer (`str` or `Path`, *optional*): Directory or Hub id of a Florence-2 or BART, for own prompts. By
            default, the checkpoint itself if it has BART's tokenizer, else `microsoft/Florence-2-large`.
        dtype (`torch.dtype`, *optional*): Dtype of the weights. By default, the checkpoint's.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): Its device. `"auto"` takes an accelerator if
            there is one.
        hub_kwargs: Arguments of `snapshot_download`.

    Raises:
        CheckpointError: If anything is missing, misshapen or damaged.
    """
    device = available_device(device)
    directory = resolve_checkpoint(path_or_id, **hub_kwargs)
    if is_adapter(directory):
        model, processor = load_pretrained(directory, dtype=dtype or "auto", device_map=device)
        return VisionEncoder.of(model.eval(), processor.image_processor, tokenizer)
    config, tensors, image_processor = _read_encoder(directory)
    with config_errors(directory), torch.device("meta"):
        tower = FlorenceVLVisionTower(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in tower.state_dict().items()}
    tensors = {name.removeprefix(TOWER): tensor for name, tensor in tensors.items() if name.startswith(TOWER)}
    check_tensors(tensors, shapes)
    # Copies: views of mapped files would keep the whole files in memory.
    state_dict = {name: tensors[name].to(dtype).load().clone(memory_format=torch.contiguous_format) for name in shapes}
    tower.load_state_dict(state_dict, assign=True)
    tower.prompts = FlorenceVLPrompts(config, config.vision_config.text_config.pad_token_id)
    tower.to(device).eval()  # type: ignore[arg-type]  # upstream's type of `self`
    return VisionEncoder(config, tower, image_processor, tokenizer or _own_tokenizer(directory) or PROMPT_TOKENIZER)


def is_adapter(directory: Path) -> bool:
    """Return whether a directory has an adapter that peft saved, and no whole model."""
    return (directory / "adapter_config.json").is_file() and not (directory / "config.json").is_file()


def _own_tokenizer(directory: Path) -> Path | None:
    """Return where a checkpoint has BART's tokenizer: a Florence-2 itself, or the tower beside an original."""
    is_tower = read_json(directory / "config.json")["model_type"] == "florence2"
    tower = directory if is_tower else directory / TOWER_DIRECTORY
    return tower if any((tower / name).is_file() for name in ("tokenizer.json", "vocab.json")) else None


def _read_encoder(directory: Path) -> tuple[FlorenceVLConfig, dict[str, LazyTensor], BaseImageProcessor]:
    """Read configuration, tensors by this package's names and image processor of any supported checkpoint."""
    model_type = read_json(directory / "config.json").get("model_type")
    if model_type == FlorenceVLConfig.model_type:
        stored = read_tensors(directory)
        return read_config(directory, stored), stored, read_processor(directory).image_processor
    if is_original(directory):
        checkpoint = read_original(directory)
        return checkpoint.config, checkpoint.tensors, checkpoint.processor.image_processor
    if model_type != "florence2":
        raise CheckpointError(f"{directory} has model type {model_type!r}, expected a Florence-VL or a Florence-2.")
    stored = read_tower_tensors(directory)
    tower = tower_settings_from_directory(directory, len(stored))
    with config_errors(directory):
        config = FlorenceVLConfig(
            vision_config=tower.config,
            image_size=tower.images["size"]["height"],
            image_feature_source=tower.image_feature_source or list(PUBLIC_IMAGE_FEATURE_SOURCE),
        )
    check_config(config, directory)
    return config, convert_names(stored), tower.image_processor(do_pad=False)


__all__ = [
    "ImageFeatures",
    "VisionEncoder",
    "extract_features",
    "load_vision_encoder",
    "position_tokens",
    "tokenize_prompts",
]
