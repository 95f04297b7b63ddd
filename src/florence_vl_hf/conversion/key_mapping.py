# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""The one table of tensor names, original and converted."""

import re
from dataclasses import dataclass, replace
from functools import cache


# Prefix of the Florence-2's tensors in the original, and in this package.
ORIGINAL_TOWER = "model.vision_tower.vision_tower."
TOWER = "model.vision_tower."

# The regular expression of each `{field}` of a pattern. A field is the same on both sides of a rule.
FIELDS = {
    "number": r"\d+",
    "later": r"[1-9]\d*",
    "block": r"blocks\.\d+\.\d+\.(?:spatial|channel)_block",
    "spatial": r"blocks\.\d+\.\d+\.spatial_block",
    "channel": r"blocks\.\d+\.\d+\.channel_block",
    "conv": r"conv1|conv2",
    "linear": r"qkv|proj|fc1|fc2",
    "axis": r"row|column",
    "leaf": r"weight|bias",
    "llm": r"(?:embed_tokens|layers|norm)\..+",
    "encoder": r"(?:layers|layernorm_embedding|embed_positions)\..+",
    "rest": r".+",
}


@dataclass(frozen=True)
class Rule:
    """One line of the table."""

    original: str  # with `{fields}`
    converted: str | None  # `None` for a tensor that is not used
    transposed: bool = False  # whether each layout holds the other's transpose
    read_only: bool = False  # whether this name of a tensor is read but never written: the original stores another


@dataclass(frozen=True)
class MappedName:
    """The other name of a tensor (`None` if it is not used there)."""

    name: str | None
    transposed: bool


# Florence-2 in the layout of its first release, and `FlorenceVLVisionTower`.
TOWER_RULES = (
    Rule("vision_tower.convs.{number}.proj.{leaf}", "backbone.convs.{number}.conv.{leaf}"),
    Rule("vision_tower.convs.{number}.norm.{leaf}", "backbone.convs.{number}.norm.{leaf}"),
    Rule("vision_tower.{block}.{conv}.fn.dw.{leaf}", "backbone.{block}.{conv}.{leaf}"),
    Rule("vision_tower.{spatial}.window_attn.norm.{leaf}", "backbone.{spatial}.norm1.{leaf}"),
    Rule("vision_tower.{spatial}.window_attn.fn.{linear}.{leaf}", "backbone.{spatial}.window_attn.{linear}.{leaf}"),
    Rule("vision_tower.{channel}.channel_attn.norm.{leaf}", "backbone.{channel}.norm1.{leaf}"),
    Rule("vision_tower.{channel}.channel_attn.fn.{linear}.{leaf}", "backbone.{channel}.channel_attn.{linear}.{leaf}"),
    Rule("vision_tower.{block}.ffn.norm.{leaf}", "backbone.{block}.norm2.{leaf}"),
    Rule("vision_tower.{block}.ffn.fn.net.{linear}.{leaf}", "backbone.{block}.ffn.{linear}.{leaf}"),
    # A bare parameter, input x output, is a linear layer here, output x input.
    Rule("image_projection", "image_projector.image_projection.weight", transposed=True),
    Rule("image_proj_norm.{leaf}", "image_projector.image_proj_norm.{leaf}"),
    Rule("image_pos_embed.{axis}_embeddings.weight", "image_projector.image_position_embed.{axis}_embeddings.weight"),
    Rule("visual_temporal_embed.pos_idx_to_embed", "image_projector.visual_temporal_embed.pos_idx_to_embed"),
    # Florence-2's tied embedding table, stored under one or more of four names: the first that exists is used.
    Rule("language_model.model.shared.weight", "encoder.embed_tokens.weight"),
    Rule("language_model.model.encoder.embed_tokens.weight", "encoder.embed_tokens.weight", read_only=True),
    Rule("language_model.model.decoder.embed_tokens.weight", "encoder.embed_tokens.weight", read_only=True),
    Rule("language_model.lm_head.weight", "encoder.embed_tokens.weight"),
    Rule("language_model.model.encoder.{encoder}", "encoder.{encoder}"),
    # The decoder never runs.
    Rule("language_model.model.decoder.{rest}", None),
    Rule("language_model.final_logits_bias", None),
    # Names in Transformers' own Florence-2, such as `florence-community/Florence-2-large`.
    Rule("vision_tower.{rest}", "backbone.{rest}", read_only=True),
    Rule("multi_modal_projector.{rest}", "image_projector.{rest}", read_only=True),
    Rule("language_model.shared.weight", "encoder.embed_tokens.weight", read_only=True),
    Rule("lm_head.weight", "encoder.embed_tokens.weight", read_only=True),
    Rule("language_model.encoder.{rest}", "encoder.{rest}", read_only=True),
    Rule("language_model.decoder.{rest}", None),
)

# Names of that embedding table, in order of preference.
TIED_WORDS = tuple(rule.original for rule in TOWER_RULES if rule.converted == "encoder.embed_tokens.weight")

# A complete original checkpoint, and `FlorenceVLForConditionalGeneration`.
MODEL_RULES = (
    Rule("model.mm_projector.encoder_mlp.0.{leaf}", "model.multi_modal_projector.layers.0.{leaf}"),
    Rule("model.mm_projector.encoder_mlp.{later}.1.{leaf}", "model.multi_modal_projector.layers.{later}.{leaf}"),
    *(
        replace(rule, original=ORIGINAL_TOWER + rule.original, converted=rule.converted and TOWER + rule.converted)
        for rule in TOWER_RULES
    ),
    # Computed from the configuration; old versions of Transformers stored it.
    Rule("model.layers.{number}.self_attn.rotary_emb.inv_freq", None),
    Rule("model.{llm}", "model.language_model.{llm}"),
    Rule("lm_head.{leaf}", "lm_head.{leaf}"),
)


@cache
def _regex(pattern: str) -> re.Pattern[str]:
    text = re.escape(pattern)
    return re.compile(re.sub(r"\\{(\w+)\\}", lambda match: f"(?P<{match[1]}>{FIELDS[match[1]]})", text))


def to_converted(name: str) -> MappedName | None:
    """Return this package's name for a tensor of an original checkpoint, or `None` if no rule matches."""
    for rule in MODEL_RULES:
        if match := _regex(rule.original).fullmatch(name):
            return MappedName(rule.converted and rule.converted.format(**match.groupdict()), rule.transposed)
    return None


def to_original(name: str) -> list[MappedName]:
    """Return the original's names for a tensor of this package, in the table's order: several if it ties tensors."""
    matches = [(rule, rule.converted and _regex(rule.converted).fullmatch(name)) for rule in MODEL_RULES]
    return [
        MappedName(rule.original.format(**match.groupdict()), rule.transposed)
        for rule, match in matches
        if match and not rule.read_only
    ]
