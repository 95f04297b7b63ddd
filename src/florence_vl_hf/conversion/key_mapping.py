# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""The one table of tensor names, original and converted."""

import re
from dataclasses import dataclass
from functools import cached_property


# Prefix of the Florence-2's tensors in the original, and in this package.
ORIGINAL_TOWER = "model.vision_tower.vision_tower."
TOWER = "model.vision_tower."

# The regular expression of each `{field}` of a pattern. A field is the same on both sides of a rule.
FIELDS = {
    "stage": r"\d+",
    "block": r"\d+",
    "layer": r"\d+",
    "later_layer": r"[1-9]\d*",
    "half": r"spatial_block|channel_block",
    "conv": r"conv1|conv2",
    "linear": r"qkv|proj|fc1|fc2",
    "axis": r"row|column",
    "leaf": r"weight|bias",
    "llm": r"(?:embed_tokens|layers|norm)\..+",
    "rest": r".+",
}


@dataclass(frozen=True)
class Rule:
    """One line of the table."""

    original: str  # with `{fields}`
    converted: str | None  # `None` for a tensor that is not used
    transposed: bool = False  # whether each layout holds the other's transpose
    alias: bool = False  # whether the original ties this name to another when it loads, and stores only that

    @cached_property
    def original_regex(self) -> re.Pattern[str]:
        return _compile(self.original)

    @cached_property
    def converted_regex(self) -> re.Pattern[str] | None:
        return None if self.converted is None else _compile(self.converted)


@dataclass(frozen=True)
class MappedName:
    """The other name of a tensor (`None` if it has none), and whether the tensor is transposed there."""

    name: str | None
    transposed: bool
    alias: bool = False


def _compile(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", pattern)  # text and fields alternate
    return re.compile(
        "".join(f"(?P<{part}>{FIELDS[part]})" if i % 2 else re.escape(part) for i, part in enumerate(parts))
    )


# Florence-2 in the layout of its first release, and `FlorenceVLVisionTower`.
TOWER_RULES = (
    Rule("vision_tower.convs.{stage}.proj.{leaf}", "backbone.convs.{stage}.conv.{leaf}"),
    Rule("vision_tower.convs.{stage}.norm.{leaf}", "backbone.convs.{stage}.norm.{leaf}"),
    Rule(
        "vision_tower.blocks.{stage}.{block}.{half}.{conv}.fn.dw.{leaf}",
        "backbone.blocks.{stage}.{block}.{half}.{conv}.{leaf}",
    ),
    Rule(
        "vision_tower.blocks.{stage}.{block}.spatial_block.window_attn.norm.{leaf}",
        "backbone.blocks.{stage}.{block}.spatial_block.norm1.{leaf}",
    ),
    Rule(
        "vision_tower.blocks.{stage}.{block}.spatial_block.window_attn.fn.{linear}.{leaf}",
        "backbone.blocks.{stage}.{block}.spatial_block.window_attn.{linear}.{leaf}",
    ),
    Rule(
        "vision_tower.blocks.{stage}.{block}.channel_block.channel_attn.norm.{leaf}",
        "backbone.blocks.{stage}.{block}.channel_block.norm1.{leaf}",
    ),
    Rule(
        "vision_tower.blocks.{stage}.{block}.channel_block.channel_attn.fn.{linear}.{leaf}",
        "backbone.blocks.{stage}.{block}.channel_block.channel_attn.{linear}.{leaf}",
    ),
    Rule(
        "vision_tower.blocks.{stage}.{block}.{half}.ffn.norm.{leaf}",
        "backbone.blocks.{stage}.{block}.{half}.norm2.{leaf}",
    ),
    Rule(
        "vision_tower.blocks.{stage}.{block}.{half}.ffn.fn.net.{linear}.{leaf}",
        "backbone.blocks.{stage}.{block}.{half}.ffn.{linear}.{leaf}",
    ),
    # A bare parameter, input x output, is a linear layer here, output x input.
    Rule("image_projection", "image_projector.image_projection.weight", transposed=True),
    Rule("image_proj_norm.{leaf}", "image_projector.image_proj_norm.{leaf}"),
    Rule("image_pos_embed.{axis}_embeddings.weight", "image_projector.image_position_embed.{axis}_embeddings.weight"),
    Rule("visual_temporal_embed.pos_idx_to_embed", "image_projector.visual_temporal_embed.pos_idx_to_embed"),
    # Florence-2's tied embedding table, stored under one or more of four names: the first that exists is used.
    Rule("language_model.model.shared.weight", "encoder.embed_tokens.weight"),
    Rule("language_model.model.encoder.embed_tokens.weight", "encoder.embed_tokens.weight", alias=True),
    Rule("language_model.model.decoder.embed_tokens.weight", "encoder.embed_tokens.weight", alias=True),
    Rule("language_model.lm_head.weight", "encoder.embed_tokens.weight"),
    Rule("language_model.model.encoder.{rest}", "encoder.{rest}"),
    # The decoder never runs.
    Rule("language_model.model.decoder.{rest}", None),
    Rule("language_model.final_logits_bias", None),
)

# Names of that embedding table.
TIED_WORDS = tuple(rule.original for rule in TOWER_RULES if rule.converted == "encoder.embed_tokens.weight")

# Names of the tower's parts in Transformers' own Florence-2, such as `florence-community/Florence-2-large`.
NATIVE_PARTS = {
    "backbone.": "model.vision_tower.",
    "image_projector.": "model.multi_modal_projector.",
    "encoder.": "model.language_model.encoder.",
}


def _native(converted: str) -> str:
    part = next(part for part in NATIVE_PARTS if converted.startswith(part))
    return NATIVE_PARTS[part] + converted.removeprefix(part)


# Florence-2 in the layout of its first release, and in Transformers' own, from which this package's tower is built.
NATIVE_TOWER_RULES = (
    *(
        Rule(rule.original, _native(rule.converted), rule.transposed)
        for rule in TOWER_RULES
        if rule.converted is not None and rule.original not in TIED_WORDS
    ),
    Rule("language_model.model.shared.weight", "model.language_model.shared.weight"),
    Rule("language_model.model.decoder.{rest}", "model.language_model.decoder.{rest}"),
    Rule("language_model.lm_head.weight", "lm_head.weight"),
)

# A complete original checkpoint, and `FlorenceVLForConditionalGeneration`.
MODEL_RULES = (
    Rule("model.mm_projector.encoder_mlp.0.{leaf}", "model.multi_modal_projector.layers.0.{leaf}"),
    Rule(
        "model.mm_projector.encoder_mlp.{later_layer}.1.{leaf}",
        "model.multi_modal_projector.layers.{later_layer}.{leaf}",
    ),
    *(
        Rule(ORIGINAL_TOWER + rule.original, rule.converted and TOWER + rule.converted, rule.transposed, rule.alias)
        for rule in TOWER_RULES
    ),
    # Computed from the configuration; old versions of Transformers stored it.
    Rule("model.layers.{layer}.self_attn.rotary_emb.inv_freq", None),
    Rule("model.{llm}", "model.language_model.{llm}"),
    Rule("lm_head.{leaf}", "lm_head.{leaf}"),
)


def to_converted(name: str) -> MappedName | None:
    """Return this package's name for a tensor of an original checkpoint, or `None` if no rule matches."""
    for rule in MODEL_RULES:  # the first that matches
        if match := rule.original_regex.fullmatch(name):
            converted = rule.converted and rule.converted.format(**match.groupdict())
            return MappedName(converted, rule.transposed, rule.alias)
    return None


def to_original(name: str) -> list[MappedName]:
    """Return the original's names for a tensor of this package: several if the original ties tensors."""
    return _originals(name, MODEL_RULES)


def to_first_release(name: str) -> MappedName | None:
    """Return the name in Florence-2's first release of a tensor of Transformers' own Florence-2, or `None`."""
    # Older versions, and the base model alone, save names without `model.`.
    originals = _originals(name, NATIVE_TOWER_RULES) or _originals(f"model.{name}", NATIVE_TOWER_RULES)
    return originals[0] if originals else None


def _originals(name: str, rules: tuple[Rule, ...]) -> list[MappedName]:
    found = []
    for i, rule in enumerate(rules):
        if rule.converted_regex is not None and (match := rule.converted_regex.fullmatch(name)):
            original = rule.original.format(**match.groupdict())
            # An earlier rule for that name takes precedence.
            if not any(earlier.original_regex.fullmatch(original) for earlier in rules[:i]):
                found.append(MappedName(original, rule.transposed, rule.alias))
    return found
