# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Translation between the `config.json` of the original and of Florence-2, and `FlorenceVLConfig`."""

import math
import re
from copy import deepcopy
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, Florence2Config, LlavaImageProcessorPil, PreTrainedConfig
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..modeling import FlorenceVLConfig
from .checkpoint_files import CheckpointError, LazyTensor, read_json
from .config_checks import check_layers, check_numbers, config_errors, own_fields
from .key_mapping import ORIGINAL_TOWER, TIED_WORDS


# LLaVA forks name their model types after the language model.
TEXT_MODEL_TYPES = {
    "llava_llama": "llama",
    "llava_phi": "phi3",
    "llava_phi3": "phi3",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
}
# The reverse: of several names, the first.
ORIGINAL_MODEL_TYPES = {ours: theirs for theirs, ours in reversed(TEXT_MODEL_TYPES.items())}

# Rope settings as older versions of Transformers wrote them, in addition to a config's own fields.
LEGACY_ROPE_FIELDS = ("rope_theta", "rope_scaling", "original_max_position_embeddings")
# Fields that a text config computes from its others by default.
DERIVED_TEXT_FIELDS = ("head_dim", "layer_types")
# Language models whose rope the original's Transformers, 4.43, can scale, and its name for the type of scaling.
ROPE_TYPE_FIELDS = {"llama": "rope_type", "phi3": "type"}

# Fields of DaViT in Florence-2's first release, and in Transformers.
DAVIT_FIELDS = {"dim_embed": "embed_dim"}
DAVIT_FIELDS |= {name: name for name in ("depths", "patch_size", "patch_stride", "patch_padding", "patch_prenorm")}
DAVIT_FIELDS |= {name: name for name in ("num_heads", "num_groups", "window_size", "drop_path_rate", "projection_dim")}
# The only types of embeddings that Florence-2's first release implements.
TEMPORAL_EMBEDDING, POSITION_EMBEDDING = {"type": "COSINE"}, {"type": "learned_abs_2d"}

# Settings of public Florence-2 models that cannot be inferred from their weights.
PUBLIC_IMAGE_FEATURE_SOURCE = FlorenceVLConfig.image_feature_source
PUBLIC_IMAGES = {
    "size": {"height": FlorenceVLConfig.image_size, "width": FlorenceVLConfig.image_size},
    "image_mean": IMAGENET_DEFAULT_MEAN,
    "image_std": IMAGENET_DEFAULT_STD,
}


class Assumption(StrEnum):
    """What a checkpoint does not say, so that a value had to be assumed."""

    TOWER_CONFIG = (
        "The vision tower has no config.json: widths and depths are inferred from the weights; numbers of heads and "
        "the window size are assumed, as in public Florence-2. For any other tower, give its directory as "
        "--vision-tower."
    )
    IMAGE_SIZE = "The vision tower sets no image size: 768 x 768 is assumed, as in public Florence-2."
    IMAGE_FEATURE_SOURCE = (
        "The vision tower does not set image_feature_source: spatial_avg_pool,temporal_avg_pool is assumed, as in "
        "public Florence-2 (577 tokens for 768 x 768; the paper counts 576). Override it with --image-feature-source."
    )
    PADDING_TOKEN = "The language model's tokenizer has no padding token: a reserved, unknown or end token is used."
    TOKENIZER = (
        "There is no tokenizer_config.json: how the tokenizer treats special tokens and spaces is assumed as in "
        "Transformers by default, and token ids may differ from the original's. Download it too."
    )


@dataclass(frozen=True)
class TowerSettings:
    """Configuration of a Florence-2, settings of its image processor, and what had to be assumed about it."""

    config: Florence2Config
    image_feature_source: list[str] | None
    images: dict[str, Any]  # with the keys of `PUBLIC_IMAGES`
    assumptions: list[Assumption]

    def image_processor(self, do_pad: bool) -> LlavaImageProcessorPil:
        """Return its image processor, which pads images to a square or only resizes them."""
        size = self.images["size"]
        return LlavaImageProcessorPil(**self.images, crop_size=size, do_center_crop=False, do_pad=do_pad)


def check_is_florence_vl(original: dict[str, Any], has_davit: bool, source: Path) -> None:
    """Refuse a `config.json` that is not an original Florence-VL's: LLaVA's own checkpoints share its model types."""
    model_type = str(original.get("model_type"))
    if model_type == FlorenceVLConfig.model_type:
        raise CheckpointError(f"{source} is in this package's layout already; load it as it is.")
    if model_type not in TEXT_MODEL_TYPES:
        known = ", ".join(TEXT_MODEL_TYPES)
        raise CheckpointError(f"{source} has model type {model_type!r}, expected one of {known}, as in the original.")
    tower = str(original.get("mm_vision_tower", original.get("vision_tower", "")))
    if re.search(r"(?<![a-z])(clip|siglip|dinov2)", tower, flags=re.IGNORECASE) and not has_davit:
        raise CheckpointError(f"{source} has the vision tower {tower!r}: it is a LLaVA, not a Florence-VL.")
    projector = str(original.get("mm_projector_type", "linear"))
    if not re.fullmatch(r"mlp[1-9]\d?x_gelu", projector):
        raise CheckpointError(f"{source} has a projector of type {projector!r}, expected one such as mlp3x_gelu.")


def text_config_from_original(original: dict[str, Any]) -> PreTrainedConfig:
    """Return the language model's configuration, whose fields an original `config.json` holds at top level."""
    config_class = CONFIG_MAPPING[TEXT_MODEL_TYPES[original["model_type"]]]
    names = (*own_fields(config_class), *LEGACY_ROPE_FIELDS)
    # A copy, since nested settings are completed in place.
    # Parity: the original's Transformers, 4.43, ignores Phi's `sliding_window` without FlashAttention, so its logits
    # differ where a sequence is longer. Published checkpoints have 262144, more than their positions.
    return config_class(**deepcopy({name: original[name] for name in names if name in original}))


def tower_settings_from_directory(directory: Path, num_tensors: float = math.inf) -> TowerSettings:
    """
    Read the settings of a Florence-2, in the layout of its first release or of Transformers.

    `num_tensors` counts tensors that include its own, if any weights are there.
    """
    path = directory / "config.json"
    raw = read_json(path)
    davit, bart = raw.get("vision_config"), raw.get("text_config")
    if raw.get("model_type") != "florence2" or not isinstance(davit, dict) or not isinstance(bart, dict):
        raise CheckpointError(f"{path} is not of a complete Florence-2; give the directory of one as --vision-tower.")
    check_layers(raw, num_tensors, path)
    with config_errors(path):
        if is_first_release(raw):
            names = own_fields(CONFIG_MAPPING["bart"])
            bart = {"model_type": "bart"} | {name: bart[name] for name in names if bart.get(name) is not None}
            config = Florence2Config(vision_config=_davit_from_first_release(davit), text_config=bart)
        else:
            config = Florence2Config.from_dict(raw)
    # Transformers 5 saves the image settings within those of the processor.
    files = (directory / name for name in ("preprocessor_config.json", "processor_config.json"))
    images: dict[str, Any] = next((read_json(file) for file in files if file.exists()), {})
    images = images.get("image_processor", images)
    if not isinstance(images, dict):
        raise CheckpointError(f"{directory} has image settings {images}, expected an object.")
    settings = {name: images.get(name, value) for name, value in PUBLIC_IMAGES.items()}
    size = settings["size"]
    if not isinstance(size, dict) or size.get("height") is None or size.get("height") != size.get("width"):
        raise CheckpointError(f"{directory} has images of size {size}, expected a square of `height` and `width`.")
    for name in ("image_mean", "image_std"):
        values = settings[name] if isinstance(settings[name], list | tuple) else []
        if len(values) != 3 or not all(isinstance(value, int | float) for value in values):
            raise CheckpointError(f"{directory} has {name} {settings[name]}, expected a number per color.")
    check_numbers(settings, math.inf, directory)
    assumptions = [] if "size" in images else [Assumption.IMAGE_SIZE]
    return TowerSettings(config, davit.get("image_feature_source"), settings, assumptions)


def is_first_release(raw: dict[str, Any]) -> bool:
    """Whether a `config.json` of Florence-2 has the form of its first release."""
    return "dim_embed" in raw.get("vision_config", {})


def _davit_from_first_release(davit: dict[str, Any]) -> dict[str, Any]:
    positions, temporal = davit.get("image_pos_embed") or {}, davit.get("visual_temporal_embedding") or {}
    if not (POSITION_EMBEDDING.items() <= positions.items() and TEMPORAL_EMBEDDING.items() <= temporal.items()):
        expected = f"{POSITION_EMBEDDING} and {TEMPORAL_EMBEDDING}"
        raise CheckpointError(
            f"DaViT has position embeddings {positions} and {temporal}, expected {expected}; give another Florence-2."
        )
    return {ours: davit[theirs] for theirs, ours in DAVIT_FIELDS.items() if theirs in davit} | {
        "max_temporal_embeddings": temporal["max_temporal_embeddings"],
        "max_position_embeddings": positions["max_pos_embeddings"],
    }


def tower_settings_from_tensors(stored: dict[str, LazyTensor]) -> TowerSettings:
    """Infer the settings of a Florence-2 from the tensors of an original checkpoint, and assume the rest."""
    tensors = {name.removeprefix(ORIGINAL_TOWER): tensor for name, tensor in stored.items()}

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors:
            raise CheckpointError(f"The vision tower lacks {name}, so its size cannot be inferred; download it again.")
        return tensors[name].shape

    def count(pattern: str) -> int:
        return len({match[1] for name in tensors if (match := re.match(pattern, name))})

    num_block_groups = count(r"vision_tower\.convs\.(\d+)\.")
    convs = [shape(f"vision_tower.convs.{group}.proj.weight") for group in range(num_block_groups)]
    embed_dim = [conv[0] for conv in convs]
    encoder = "language_model.model.encoder."
    d_model = shape(encoder + "layernorm_embedding.weight")[0]
    # In public Florence-2 models, heads have 32 channels in DaViT and 64 in the encoder.
    num_heads, encoder_heads = [max(1, width // 32) for width in embed_dim], max(1, d_model // 64)
    words = next((name for name in TIED_WORDS if name in tensors), TIED_WORDS[0])

    config = Florence2Config(
        vision_config={
            "embed_dim": embed_dim,
            "num_heads": num_heads,
            "num_groups": num_heads,
            "depths": [count(rf"vision_tower\.blocks\.{group}\.(\d+)\.") for group in range(num_block_groups)],
            "patch_size": [conv[-1] for conv in convs],
            # The norm before a convolution is as wide as what comes in.
            "patch_prenorm": [
                shape(f"vision_tower.convs.{group}.norm.weight")[0] != conv[0] for group, conv in enumerate(convs)
            ],
            "projection_dim": shape("image_projection")[-1],
            "max_position_embeddings": shape("image_pos_embed.row_embeddings.weight")[0],
            "max_temporal_embeddings": shape("visual_temporal_embed.pos_idx_to_embed")[0],
        },
        text_config={
            "model_type": "bart",
            "vocab_size": shape(words)[0],
            "d_model": d_model,
            "encoder_layers": count(encoder.replace(".", r"\.") + r"layers\.(\d+)\."),
            "encoder_attention_heads": encoder_heads,
            "encoder_ffn_dim": shape(encoder + "layers.0.fc1.weight")[0],
            "decoder_layers": count(r"language_model\.model\.decoder\.layers\.(\d+)\."),
            # BART keeps two positions for padding, which its configuration does not count.
            "max_position_embeddings": shape(encoder + "embed_positions.weight")[0] - 2,
            "scale_embedding": False,
        },
    )
    return TowerSettings(config, None, PUBLIC_IMAGES, [Assumption.TOWER_CONFIG, Assumption.IMAGE_SIZE])


def text_config_to_original(config: PreTrainedConfig) -> tuple[dict[str, Any], list[str]]:
    """Return the original `config.json` of a language model (Transformers 4.43), and what it cannot express."""
    if config.model_type not in ORIGINAL_MODEL_TYPES:
        return {}, [f"a language model of type {config.model_type!r} (only {', '.join(ORIGINAL_MODEL_TYPES)})"]
    settings = {name: getattr(config, name) for name in own_fields(type(config))}
    # Phi-3 has its type of scaling, and `original_max_position_embeddings`, in two places.
    settings["rope_parameters"] = {name: value for name, value in config.rope_parameters.items() if name != "type"}
    rope = {name: value for name, value in settings["rope_parameters"].items() if name not in settings}
    rope_theta, rope_type = rope.pop("rope_theta"), rope.pop("rope_type", "default")
    rope.pop("partial_rotary_factor", None)
    can_scale = rope_type != "default" and config.model_type in ROPE_TYPE_FIELDS
    original = {
        "model_type": ORIGINAL_MODEL_TYPES[config.model_type],
        **{name: value for name, value in settings.items() if name not in (*DERIVED_TEXT_FIELDS, "rope_parameters")},
        "rope_theta": rope_theta,
        "rope_scaling": {ROPE_TYPE_FIELDS[config.model_type]: rope_type} | rope if can_scale else None,
    }
    translated = text_config_from_original(original)
    translated.rope_parameters.pop("type", None)
    return original, [f"{name} {value}" for name, value in settings.items() if getattr(translated, name) != value]


def tower_config_to_first_release(config: FlorenceVLConfig) -> tuple[dict[str, Any], list[str]]:
    """Return the `config.json` of a model's Florence-2 in its first release, and what it cannot express."""
    davit, bart = config.vision_config.vision_config, config.vision_config.text_config
    vision_config = {theirs: getattr(davit, ours) for theirs, ours in DAVIT_FIELDS.items()} | {
        "model_type": "davit",
        "enable_checkpoint": False,
        "visual_temporal_embedding": TEMPORAL_EMBEDDING | {"max_temporal_embeddings": davit.max_temporal_embeddings},
        "image_pos_embed": POSITION_EMBEDDING | {"max_pos_embeddings": davit.max_position_embeddings},
        "image_feature_source": list(config.image_feature_source),
    }
    translated = type(davit)(**_davit_from_first_release(vision_config))
    inexpressible = [
        f"a tower with {name} {getattr(davit, name)}"
        for name in own_fields(type(davit))
        if getattr(davit, name) != getattr(translated, name)
    ]
    return {
        "architectures": ["Florence2ForConditionalGeneration"],
        "model_type": "florence2",
        "vision_config": vision_config,
        "text_config": {name: getattr(bart, name) for name in own_fields(type(bart))},
        "projection_dim": davit.projection_dim,
        **{name: getattr(bart, name) for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")},
        "ignore_index": -100,
        "is_encoder_decoder": True,
    }, inexpressible
