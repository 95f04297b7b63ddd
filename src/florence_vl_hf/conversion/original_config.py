# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Translation of the original's `config.json`, and of Florence-2's, into a `FlorenceVLConfig`."""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, Florence2Config, PreTrainedConfig

from ..modeling import FlorenceVLConfig
from .errors import CheckpointError
from .key_mapping import ORIGINAL_TOWER, TIED_WORDS
from .stored_tensors import StoredTensor, read_json


# LLaVA forks name their model types after the language model.
TEXT_MODEL_TYPES = {
    "llava_llama": "llama",
    "llava_phi": "phi3",
    "llava_phi3": "phi3",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
}

# And back: of several names, the first.
ORIGINAL_MODEL_TYPES = {ours: theirs for theirs, ours in reversed(TEXT_MODEL_TYPES.items())}

# The forms that rope settings took in configurations of older versions of Transformers, beside a config's own fields.
LEGACY_ROPE_FIELDS = ("rope_theta", "rope_scaling", "original_max_position_embeddings")

# What Florence-2's first release calls the fields of DaViT, and what Transformers calls them.
DAVIT_FIELDS = {"dim_embed": "embed_dim"} | {
    name: name
    for name in (
        "depths",
        "patch_size",
        "patch_stride",
        "patch_padding",
        "patch_prenorm",
        "num_heads",
        "num_groups",
        "window_size",
        "drop_path_rate",
        "projection_dim",
    )
}

# What a language model's configuration computes out of its other fields, unless it is told otherwise.
DERIVED_TEXT_FIELDS = ("head_dim", "layer_types")
# Language models whose rope the original's Transformers, 4.43, can scale, and what it calls the kind of scaling.
ROPE_TYPE_FIELDS = {"llama": "rope_type", "phi3": "type"}

# Florence-2's first release has one kind of each.
TEMPORAL_EMBEDDING, POSITION_EMBEDDING = "COSINE", "learned_abs_2d"

# The public Florence-2, base and large alike: what cannot be read off the weights.
PUBLIC_HEAD_DIM = 32
PUBLIC_ENCODER_HEAD_DIM = 64
PUBLIC_IMAGE_SIZE = 768
PUBLIC_IMAGE_FEATURE_SOURCE = ("spatial_avg_pool", "temporal_avg_pool")
PUBLIC_IMAGE_MEAN = (0.485, 0.456, 0.406)
PUBLIC_IMAGE_STD = (0.229, 0.224, 0.225)


@dataclass
class TowerSettings:
    """All that a Florence-2 folder tells: its configuration, its picture settings, and what had to be assumed."""

    config: Florence2Config
    image_feature_source: list[str]
    image_size: int = PUBLIC_IMAGE_SIZE
    image_mean: list[float] = field(default_factory=lambda: list(PUBLIC_IMAGE_MEAN))
    image_std: list[float] = field(default_factory=lambda: list(PUBLIC_IMAGE_STD))
    assumptions: list[str] = field(default_factory=list)

    def override_image_feature_source(self, image_feature_source: list[str] | None) -> None:
        """Take a user's word, if there is one, and assume nothing any more."""
        if image_feature_source is not None:
            self.image_feature_source = image_feature_source
            self.assumptions = [assumed for assumed in self.assumptions if "--image-feature-source" not in assumed]


def text_config_from_original(original: dict[str, Any]) -> PreTrainedConfig:
    """The language model's configuration, out of an original `config.json`, which holds it at top level."""
    model_type = TEXT_MODEL_TYPES[original["model_type"]]
    config_class = CONFIG_MAPPING[model_type]
    known = {config_field.name for config_field in fields(config_class)} | set(LEGACY_ROPE_FIELDS)
    not_ours = {"architectures", "transformers_version", "dtype"}
    return config_class(**{name: value for name, value in original.items() if name in known - not_ours})


def check_is_florence_vl(original: dict[str, Any], tensors: dict[str, StoredTensor], where: str) -> None:
    """
    Refuse, by name, what is no Florence-VL: LLaVA's own checkpoints share its model types.

    Raises:
        CheckpointError: If `original` is not the configuration of a Florence-VL.
    """
    model_type = original.get("model_type")
    if model_type == FlorenceVLConfig.model_type:
        raise CheckpointError(f"{where} is in this package's layout already; load it as it is.")
    if model_type not in TEXT_MODEL_TYPES:
        raise CheckpointError(
            f"{where} has model type {model_type!r}, expected one of {', '.join(TEXT_MODEL_TYPES)}; give an original "
            f"Florence-VL checkpoint."
        )
    tower = str(original.get("mm_vision_tower", original.get("vision_tower", "")))
    projector = str(original.get("mm_projector_type", "linear"))
    has_davit = any(name.startswith(ORIGINAL_TOWER + "vision_tower.blocks.") for name in tensors)
    if re.search(r"(?<![a-z])(clip|siglip|dinov2)", tower, flags=re.IGNORECASE) and not has_davit:
        raise CheckpointError(
            f"{where} looks through {tower!r}, not through Florence-2: it is a LLaVA, not a Florence-VL. Transformers "
            f"has LLaVA models of its own."
        )
    if not re.fullmatch(r"mlp\d+x_gelu", projector):
        raise CheckpointError(
            f"{where} has a projector of type {projector!r}, expected mlpNx_gelu with N linear layers, such as "
            f"mlp3x_gelu; only these are published."
        )


def tower_settings_from_folder(folder: Path) -> TowerSettings:
    """Read the settings of a Florence-2 folder, in the layout of its first release or of Transformers."""
    raw = read_json(folder / "config.json")
    davit, bart = raw.get("vision_config"), raw.get("text_config")
    if raw.get("model_type") != "florence2" or not isinstance(davit, dict) or not isinstance(bart, dict):
        raise CheckpointError(
            f"{folder / 'config.json'} has model type {raw.get('model_type')!r}, expected a florence2 with "
            f"`vision_config` and `text_config`; give Florence-2's own folder as --vision-tower."
        )
    if is_first_release(raw):
        config = Florence2Config(vision_config=_davit_from_first_release(davit, folder), text_config=_bart(bart))
    else:
        config = Florence2Config.from_dict(raw)
    settings = TowerSettings(config, image_feature_source=davit.get("image_feature_source"))
    if settings.image_feature_source is None:
        settings.image_feature_source = list(PUBLIC_IMAGE_FEATURE_SOURCE)
        settings.assumptions.append(_assume_source(f"{folder / 'config.json'} has no image_feature_source"))
    _read_picture_settings(folder, settings)
    return settings


def is_first_release(raw: dict[str, Any]) -> bool:
    """Whether Florence-2's `config.json` has the form of its first release."""
    return "dim_embed" in raw.get("vision_config", {})


def _davit_from_first_release(davit: dict[str, Any], folder: Path) -> dict[str, Any]:
    temporal, positions = davit.get("visual_temporal_embedding"), davit.get("image_pos_embed")
    kinds = [embedding.get("type") if embedding else None for embedding in (positions, temporal)]
    if kinds != [POSITION_EMBEDDING, TEMPORAL_EMBEDDING]:
        raise CheckpointError(
            f"{folder / 'config.json'} has position embeddings {positions} and {temporal}, expected "
            f"{POSITION_EMBEDDING} and {TEMPORAL_EMBEDDING}; no other Florence-2 is known."
        )
    return {ours: davit[theirs] for theirs, ours in DAVIT_FIELDS.items() if theirs in davit} | {
        "max_temporal_embeddings": temporal["max_temporal_embeddings"],
        "max_position_embeddings": positions["max_pos_embeddings"],
    }


def _bart(bart: dict[str, Any]) -> dict[str, Any]:
    own = _own_fields(CONFIG_MAPPING["bart"])
    return {"model_type": "bart"} | {name: value for name, value in bart.items() if name in own and value is not None}


def _own_fields(config_class: type[PreTrainedConfig]) -> list[str]:
    """Sizes, rates and token ids of a kind of model; not what every configuration says of outputs and labels."""
    common = {config_field.name for config_field in fields(PreTrainedConfig)} | {"num_labels"}
    return [config_field.name for config_field in fields(config_class) if config_field.name not in common]


def text_config_to_original(config: PreTrainedConfig) -> tuple[dict[str, Any], list[str]]:
    """
    The language model's part of an original `config.json`, as Transformers 4.43 reads it.

    Returns:
        `tuple[dict, list[str]]`: The fields, and what of the configuration they cannot express.
    """
    if config.model_type not in ORIGINAL_MODEL_TYPES:
        return {}, [f"a language model of type {config.model_type!r} (only {', '.join(ORIGINAL_MODEL_TYPES)})"]
    settings = {name: getattr(config, name) for name in _own_fields(type(config))}
    inexpressible = []
    plain = {name: value for name, value in settings.items() if name not in (*DERIVED_TEXT_FIELDS, "rope_parameters")}
    as_derived = type(config)(**plain)
    for name in set(DERIVED_TEXT_FIELDS) & set(settings):
        if settings[name] != getattr(as_derived, name):
            inexpressible.append(f"{name} {settings[name]}")

    rope = dict(config.rope_parameters)
    rope_type = rope.pop("rope_type", "default")
    plain["rope_theta"] = rope.pop("rope_theta")
    rope.pop("type", None)
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        inexpressible.append(f"partial_rotary_factor {config.rope_parameters['partial_rotary_factor']}")
    for name in set(rope) & set(plain):  # Phi-3 has its original_max_position_embeddings at both places
        rope.pop(name)
    if rope_type == "default":
        plain["rope_scaling"] = None
    elif config.model_type in ROPE_TYPE_FIELDS:
        plain["rope_scaling"] = {ROPE_TYPE_FIELDS[config.model_type]: rope_type} | rope
    else:
        inexpressible.append(f"{rope_type!r} scaling of rope in a language model of type {config.model_type!r}")
    return {"model_type": ORIGINAL_MODEL_TYPES[config.model_type]} | plain, inexpressible


def tower_config_to_first_release(config: FlorenceVLConfig) -> tuple[dict[str, Any], list[str]]:
    """
    The `config.json` of a model's Florence-2, in the form of its first release.

    Returns:
        `tuple[dict, list[str]]`: The configuration, and what of the model's it cannot express.
    """
    davit, bart = config.vision_config.vision_config, config.vision_config.text_config
    vision_config = {theirs: getattr(davit, ours) for theirs, ours in DAVIT_FIELDS.items()} | {
        "model_type": "davit",
        "enable_checkpoint": False,
        "visual_temporal_embedding": {
            "type": TEMPORAL_EMBEDDING,
            "max_temporal_embeddings": davit.max_temporal_embeddings,
        },
        "image_pos_embed": {"type": POSITION_EMBEDDING, "max_pos_embeddings": davit.max_position_embeddings},
        "image_feature_source": list(config.image_feature_source),
    }
    expressed = {*DAVIT_FIELDS.values(), "max_temporal_embeddings", "max_position_embeddings", "initializer_range"}
    default = type(davit)()
    inexpressible = [
        f"a tower with {name} {getattr(davit, name)}"
        for name in _own_fields(type(davit))
        if name not in expressed and getattr(davit, name) != getattr(default, name)
    ]
    return {
        "architectures": ["Florence2ForConditionalGeneration"],
        "model_type": "florence2",
        "vision_config": vision_config,
        "text_config": {name: getattr(bart, name) for name in _own_fields(type(bart))},
        "projection_dim": davit.projection_dim,
        "vocab_size": bart.vocab_size,
        "bos_token_id": bart.bos_token_id,
        "eos_token_id": bart.eos_token_id,
        "pad_token_id": bart.pad_token_id,
        "ignore_index": -100,
        "is_encoder_decoder": True,
    }, inexpressible


def _read_picture_settings(folder: Path, settings: TowerSettings) -> None:
    # Transformers 5 saves the picture settings within those of the processor.
    path, within = folder / "preprocessor_config.json", folder / "processor_config.json"
    if path.exists():
        raw = read_json(path)
    elif within.exists() and isinstance(read_json(within).get("image_processor"), dict):
        path, raw = within, read_json(within)["image_processor"]
    else:
        settings.assumptions.append(
            f"{folder} has no preprocessor_config.json: pictures are taken to be "
            f"{PUBLIC_IMAGE_SIZE} x {PUBLIC_IMAGE_SIZE}, as public Florence-2's."
        )
        return
    size = raw.get("size", {"height": PUBLIC_IMAGE_SIZE, "width": PUBLIC_IMAGE_SIZE})
    if not isinstance(size, dict) or size.get("height") is None or size.get("height") != size.get("width"):
        raise CheckpointError(f"{path} has size {size}, expected a square of `height` and `width`.")
    settings.image_size = size["height"]
    settings.image_mean = raw.get("image_mean", settings.image_mean)
    settings.image_std = raw.get("image_std", settings.image_std)


def tower_settings_from_tensors(tensors: dict[str, StoredTensor]) -> TowerSettings:
    """
    Read the settings of a Florence-2 off the shapes of its tensors, and the rest off public Florence-2.

    Args:
        tensors (`dict[str, StoredTensor]`): Tensors by their names in Florence-2's first release.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors:
            raise CheckpointError(
                f"The vision tower has no tensor {name}, so its size cannot be told; fetch it again."
            )
        return tensors[name].shape

    def count(pattern: str) -> int:
        return len({match[1] for name in tensors if (match := re.match(pattern, name))})

    num_stages = count(r"vision_tower\.convs\.(\d+)\.")
    convs = [shape(f"vision_tower.convs.{stage}.proj.weight") for stage in range(num_stages)]
    embed_dim = [conv[0] for conv in convs]
    num_heads = [_num_heads(width, PUBLIC_HEAD_DIM) for width in embed_dim]
    width, projection_dim = shape("image_projection")
    encoder = "language_model.model.encoder."
    d_model = shape(encoder + "layernorm_embedding.weight")[0]
    words = next((name for name in TIED_WORDS if name in tensors), TIED_WORDS[0])

    config = Florence2Config(
        vision_config={
            "embed_dim": embed_dim,
            "num_heads": num_heads,
            "num_groups": num_heads,
            "depths": [count(rf"vision_tower\.blocks\.{stage}\.(\d+)\.") for stage in range(num_stages)],
            "patch_size": [conv[-1] for conv in convs],
            # The norm before a convolution is as wide as what comes in.
            "patch_prenorm": [
                shape(f"vision_tower.convs.{stage}.norm.weight")[0] != conv[0] for stage, conv in enumerate(convs)
            ],
            "projection_dim": projection_dim,
            "max_position_embeddings": shape("image_pos_embed.row_embeddings.weight")[0],
            "max_temporal_embeddings": shape("visual_temporal_embed.pos_idx_to_embed")[0],
        },
        text_config={
            "model_type": "bart",
            "vocab_size": shape(words)[0],
            "d_model": d_model,
            "encoder_layers": count(encoder.replace(".", r"\.") + r"layers\.(\d+)\."),
            "encoder_attention_heads": _num_heads(d_model, PUBLIC_ENCODER_HEAD_DIM),
            "encoder_ffn_dim": shape(encoder + "layers.0.fc1.weight")[0],
            "decoder_layers": count(r"language_model\.model\.decoder\.layers\.(\d+)\."),
            # BART keeps two positions for padding, which its configuration does not count.
            "max_position_embeddings": shape(encoder + "embed_positions.weight")[0] - 2,
            "scale_embedding": False,
        },
    )
    assumptions = [
        f"There is no config.json of the vision tower: its widths {embed_dim} and depths come from the weights; taken "
        f"from public Florence-2 are {PUBLIC_HEAD_DIM} channels per head (heads {num_heads}) in DaViT and "
        f"{PUBLIC_ENCODER_HEAD_DIM} (heads {config.text_config.encoder_attention_heads}) in the encoder, windows of "
        f"{config.vision_config.window_size} and pictures of {PUBLIC_IMAGE_SIZE} x {PUBLIC_IMAGE_SIZE}. If the tower "
        f"is another one, give its folder as --vision-tower.",
        _assume_source("Nothing here tells the image_feature_source"),
    ]
    return TowerSettings(config, list(PUBLIC_IMAGE_FEATURE_SOURCE), assumptions=assumptions)


def _num_heads(width: int, head_dim: int) -> int:
    """As many heads of `head_dim` as fit into `width`, but a number that divides it."""
    return next(heads for heads in range(max(1, width // head_dim), 0, -1) if width % heads == 0)


def _assume_source(why: str) -> str:
    source = ",".join(PUBLIC_IMAGE_FEATURE_SOURCE)
    return (
        f"{why}: public Florence-2's is taken, {source} (577 tokens for 768 x 768; the paper counts 576). Override it "
        f"with --image-feature-source."
    )


__all__ = [
    "ORIGINAL_MODEL_TYPES",
    "TEXT_MODEL_TYPES",
    "TowerSettings",
    "check_is_florence_vl",
    "is_first_release",
    "text_config_from_original",
    "text_config_to_original",
    "tower_config_to_first_release",
    "tower_settings_from_folder",
    "tower_settings_from_tensors",
]
