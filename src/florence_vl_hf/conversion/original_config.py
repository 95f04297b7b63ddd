# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Translation between the `config.json` of the original and of Florence-2, and `FlorenceVLConfig`."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from enum import Enum, auto
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, Florence2Config, PreTrainedConfig

from ..modeling import FlorenceVLConfig
from .checkpoint_files import CheckpointError, LazyTensor, read_json
from .key_mapping import TIED_WORDS


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
DAVIT_FIELDS = {"dim_embed": "embed_dim"} | {
    name: name
    for name in (
        "depths patch_size patch_stride patch_padding patch_prenorm num_heads num_groups window_size drop_path_rate "
        "projection_dim"
    ).split()
}
# The only types that Florence-2's first release implements.
TEMPORAL_EMBEDDING, POSITION_EMBEDDING = "COSINE", "learned_abs_2d"

# Settings of the public Florence-2, base and large, that cannot be inferred from the weights.
PUBLIC_HEAD_DIM = 32
PUBLIC_ENCODER_HEAD_DIM = 64
PUBLIC_IMAGE_SIZE = 768
PUBLIC_IMAGE_FEATURE_SOURCE = ("spatial_avg_pool", "temporal_avg_pool")
PUBLIC_IMAGE_MEAN = (0.485, 0.456, 0.406)
PUBLIC_IMAGE_STD = (0.229, 0.224, 0.225)


class AssumptionKind(Enum):
    """What a checkpoint does not say, so that a value had to be assumed."""

    TOWER_CONFIG = auto()
    IMAGE_FEATURE_SOURCE = auto()
    IMAGE_SIZE = auto()
    PADDING_TOKEN = auto()


@dataclass(frozen=True)
class Assumption:
    """A value that was assumed."""

    kind: AssumptionKind
    directory: Path | None = None  # of the vision tower that lacks it, if there is one
    tower: Florence2Config | None = None  # inferred, for `TOWER_CONFIG`
    token: str | None = None  # used, for `PADDING_TOKEN`


def describe_assumption(assumption: Assumption, display_name: Callable[[Path], str] = str) -> str:
    """Render an assumption as a sentence, in which directories are called as `display_name` says."""
    directory = assumption.directory and display_name(assumption.directory)
    image_size = f"{PUBLIC_IMAGE_SIZE} x {PUBLIC_IMAGE_SIZE}"
    if assumption.tower is not None:
        davit, bart = (assumption.tower.to_dict()[part] for part in ("vision_config", "text_config"))
        return (
            f"The vision tower has no config.json: its widths {davit['embed_dim']} and depths are inferred from the "
            f"weights; assumed as in public Florence-2 are {PUBLIC_HEAD_DIM} channels per head (heads "
            f"{davit['num_heads']}) in DaViT and {PUBLIC_ENCODER_HEAD_DIM} (heads {bart['encoder_attention_heads']}) "
            f"in the encoder, windows of {davit['window_size']} and images of {image_size}. For any other tower, give "
            f"its directory as --vision-tower."
        )
    if assumption.kind is AssumptionKind.PADDING_TOKEN:
        return f"The tokenizer of the language model has no padding token: {assumption.token} is used."
    if assumption.kind is AssumptionKind.IMAGE_SIZE:
        return f"{directory} has no preprocessor_config.json: images of {image_size} are assumed, as in Florence-2."
    return (
        f"{f'{directory} does not set' if directory else 'No file sets'} image_feature_source: assumed as in public "
        f"Florence-2 is {','.join(PUBLIC_IMAGE_FEATURE_SOURCE)} (577 tokens for {image_size}; the paper counts 576). "
        f"Override it with --image-feature-source."
    )


@dataclass
class TowerSettings:
    """Configuration and image settings of a Florence-2, and what had to be assumed about them."""

    config: Florence2Config
    image_feature_source: list[str]
    image_size: int = PUBLIC_IMAGE_SIZE
    image_mean: list[float] = field(default_factory=lambda: list(PUBLIC_IMAGE_MEAN))
    image_std: list[float] = field(default_factory=lambda: list(PUBLIC_IMAGE_STD))
    assumptions: list[Assumption] = field(default_factory=list)


def check_is_florence_vl(original: dict[str, Any], has_davit: bool, source: Path) -> None:
    """Refuse a `config.json` that is not an original Florence-VL's: LLaVA's own checkpoints share its model types."""
    model_type = original.get("model_type")
    if model_type == FlorenceVLConfig.model_type:
        raise CheckpointError(f"{source} is in this package's layout already; load it as it is.")
    if model_type not in TEXT_MODEL_TYPES:
        raise CheckpointError(
            f"{source} has model type {model_type!r}, expected one of {', '.join(TEXT_MODEL_TYPES)}; give an original "
            f"Florence-VL checkpoint."
        )
    tower = str(original.get("mm_vision_tower", original.get("vision_tower", "")))
    if re.search(r"(?<![a-z])(clip|siglip|dinov2)", tower, flags=re.IGNORECASE) and not has_davit:
        raise CheckpointError(
            f"{source} has the vision tower {tower!r} instead of a Florence-2: it is a LLaVA, not a Florence-VL. "
            f"Transformers has LLaVA models of its own."
        )
    projector = str(original.get("mm_projector_type", "linear"))
    if not re.fullmatch(r"mlp\d+x_gelu", projector):
        raise CheckpointError(
            f"{source} has a projector of type {projector!r}, expected mlpNx_gelu with N linear layers, such as "
            f"mlp3x_gelu; no other is published."
        )


def text_config_from_original(original: dict[str, Any]) -> PreTrainedConfig:
    """Return the language model's configuration, whose fields an original `config.json` holds at top level."""
    config_class = CONFIG_MAPPING[TEXT_MODEL_TYPES[original["model_type"]]]
    known = {config_field.name for config_field in fields(config_class)} | set(LEGACY_ROPE_FIELDS)
    known -= {"architectures", "transformers_version", "dtype"}
    return config_class(**{name: value for name, value in original.items() if name in known})


def own_fields(config_class: type[PreTrainedConfig]) -> list[str]:
    """Return the fields of a config class that not every config has: sizes, rates and token ids."""
    common = {config_field.name for config_field in fields(PreTrainedConfig)} | {"num_labels"}
    return [config_field.name for config_field in fields(config_class) if config_field.name not in common]


def tower_settings_from_directory(directory: Path, image_feature_source: list[str] | None = None) -> TowerSettings:
    """Read the settings of a Florence-2, in the layout of its first release or of Transformers."""
    path = directory / "config.json"
    raw = read_json(path)
    davit, bart = raw.get("vision_config"), raw.get("text_config")
    if raw.get("model_type") != "florence2" or not isinstance(davit, dict) or not isinstance(bart, dict):
        raise CheckpointError(
            f"{path} has model type {raw.get('model_type')!r}, expected a florence2 with `vision_config` and "
            f"`text_config`; give the directory of a Florence-2 as --vision-tower."
        )
    if is_first_release(raw):
        names = own_fields(CONFIG_MAPPING["bart"])
        bart = {"model_type": "bart"} | {name: bart[name] for name in names if bart.get(name) is not None}
        config = Florence2Config(vision_config=_davit_from_first_release(davit, path), text_config=bart)
    else:
        config = Florence2Config.from_dict(raw)
    source = image_feature_source or davit.get("image_feature_source")
    settings = TowerSettings(config, source or list(PUBLIC_IMAGE_FEATURE_SOURCE))
    if source is None:
        settings.assumptions.append(Assumption(AssumptionKind.IMAGE_FEATURE_SOURCE, directory))
    _read_image_settings(directory, settings)
    return settings


def is_first_release(raw: dict[str, Any]) -> bool:
    """Whether a `config.json` of Florence-2 has the form of its first release."""
    return "dim_embed" in raw.get("vision_config", {})


def _davit_from_first_release(davit: dict[str, Any], path: Path) -> dict[str, Any]:
    positions, temporal = davit.get("image_pos_embed"), davit.get("visual_temporal_embedding")
    types = [embedding.get("type") if embedding else None for embedding in (positions, temporal)]
    if not positions or not temporal or types != [POSITION_EMBEDDING, TEMPORAL_EMBEDDING]:
        raise CheckpointError(
            f"{path} has position embeddings {positions} and {temporal}, expected {POSITION_EMBEDDING} and "
            f"{TEMPORAL_EMBEDDING}; no other Florence-2 is supported."
        )
    return {ours: davit[theirs] for theirs, ours in DAVIT_FIELDS.items() if theirs in davit} | {
        "max_temporal_embeddings": temporal["max_temporal_embeddings"],
        "max_position_embeddings": positions["max_pos_embeddings"],
    }


def _read_image_settings(directory: Path, settings: TowerSettings) -> None:
    # Transformers 5 saves the image settings within those of the processor.
    path, processor_path = directory / "preprocessor_config.json", directory / "processor_config.json"
    if path.exists():
        raw = read_json(path)
    elif processor_path.exists() and isinstance(read_json(processor_path).get("image_processor"), dict):
        path, raw = processor_path, read_json(processor_path)["image_processor"]
    else:
        settings.assumptions.append(Assumption(AssumptionKind.IMAGE_SIZE, directory))
        return
    size = raw.get("size", {"height": PUBLIC_IMAGE_SIZE, "width": PUBLIC_IMAGE_SIZE})
    if not isinstance(size, dict) or size.get("height") is None or size.get("height") != size.get("width"):
        raise CheckpointError(f"{path} has size {size}, expected a square of `height` and `width`.")
    settings.image_size = size["height"]
    settings.image_mean = raw.get("image_mean", settings.image_mean)
    settings.image_std = raw.get("image_std", settings.image_std)


def tower_settings_from_tensors(
    tensors: dict[str, LazyTensor], image_feature_source: list[str] | None = None
) -> TowerSettings:
    """Infer the settings of a Florence-2 from its tensors, with first-release names, and assume the rest."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors:
            raise CheckpointError(f"The vision tower lacks {name}, so its size cannot be inferred; download it again.")
        return tensors[name].shape

    def count(pattern: str) -> int:
        return len({match[1] for name in tensors if (match := re.match(pattern, name))})

    num_block_groups = count(r"vision_tower\.convs\.(\d+)\.")
    convs = [shape(f"vision_tower.convs.{group}.proj.weight") for group in range(num_block_groups)]
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
            "depths": [count(rf"vision_tower\.blocks\.{group}\.(\d+)\.") for group in range(num_block_groups)],
            "patch_size": [conv[-1] for conv in convs],
            # The norm before a convolution is as wide as what comes in.
            "patch_prenorm": [
                shape(f"vision_tower.convs.{group}.norm.weight")[0] != conv[0] for group, conv in enumerate(convs)
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
    assumptions = [Assumption(AssumptionKind.TOWER_CONFIG, tower=config)]
    if image_feature_source is None:
        assumptions.append(Assumption(AssumptionKind.IMAGE_FEATURE_SOURCE))
    return TowerSettings(config, image_feature_source or list(PUBLIC_IMAGE_FEATURE_SOURCE), assumptions=assumptions)


def _num_heads(width: int, head_dim: int) -> int:
    """Return the largest number of heads that divides `width` and leaves each at least `head_dim` channels."""
    return next(heads for heads in range(max(1, width // head_dim), 0, -1) if width % heads == 0)


def text_config_to_original(config: PreTrainedConfig) -> tuple[dict[str, Any], list[str]]:
    """Return the original `config.json` of a language model (Transformers 4.43), and what it cannot express."""
    if config.model_type not in ORIGINAL_MODEL_TYPES:
        return {}, [f"a language model of type {config.model_type!r} (only {', '.join(ORIGINAL_MODEL_TYPES)})"]
    settings = {name: getattr(config, name) for name in own_fields(type(config))}
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
    for name in set(rope) & set(plain):  # Phi-3 has original_max_position_embeddings in both places
        rope.pop(name)
    if rope_type == "default":
        plain["rope_scaling"] = None
    elif config.model_type in ROPE_TYPE_FIELDS:
        plain["rope_scaling"] = {ROPE_TYPE_FIELDS[config.model_type]: rope_type} | rope
    else:
        inexpressible.append(f"rope scaling {rope_type!r} in a language model of type {config.model_type!r}")
    return {"model_type": ORIGINAL_MODEL_TYPES[config.model_type]} | plain, inexpressible


def tower_config_to_first_release(config: FlorenceVLConfig) -> tuple[dict[str, Any], list[str]]:
    """Return the `config.json` of a model's Florence-2 in its first release, and what it cannot express."""
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
        for name in own_fields(type(davit))
        if name not in expressed and getattr(davit, name) != getattr(default, name)
    ]
    return {
        "architectures": ["Florence2ForConditionalGeneration"],
        "model_type": "florence2",
        "vision_config": vision_config,
        "text_config": {name: getattr(bart, name) for name in own_fields(type(bart))},
        "projection_dim": davit.projection_dim,
        "vocab_size": bart.vocab_size,
        "bos_token_id": bart.bos_token_id,
        "eos_token_id": bart.eos_token_id,
        "pad_token_id": bart.pad_token_id,
        "ignore_index": -100,
        "is_encoder_decoder": True,
    }, inexpressible
