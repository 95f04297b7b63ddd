# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Florence-VL model configuration: every number that the model and the processor share is derived here."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, Florence2Config, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.utils import auto_docstring


# The name of V, the features that come straight from DaViT, among the prompts' names.
IMAGE_FEATURE = "image"

# The three prompts of the paper. Parity: the original keeps these ids as constants, padded with 1 to one length.
DEFAULT_PROMPTS = {
    "caption": "Describe in detail what is shown in the image.",
    "ocr": "What is the text in the image?",
    "grounding": "Locate the objects in the image, with their descriptions.",
}
DEFAULT_PROMPT_TOKEN_IDS = {
    "caption": [0, 47066, 21700, 11, 4617, 99, 16, 2343, 11, 5, 2274, 4, 2, 1],
    "ocr": [0, 2264, 16, 5, 2788, 11, 5, 2274, 116, 2, 1, 1, 1, 1],
    "grounding": [0, 574, 22486, 5, 8720, 11, 5, 2274, 6, 19, 49, 24173, 4, 2],
}

# Florence-2-large, the eye of every published Florence-VL.
FLORENCE_2_LARGE = {
    "vision_config": {
        "embed_dim": [256, 512, 1024, 2048],
        "num_heads": [8, 16, 32, 64],
        "num_groups": [8, 16, 32, 64],
        "depths": [1, 1, 9, 1],
        "projection_dim": 1024,
    },
    "text_config": {
        "model_type": "bart",
        "vocab_size": 51289,
        "d_model": 1024,
        "encoder_layers": 12,
        "encoder_attention_heads": 16,
        "encoder_ffn_dim": 4096,
        "decoder_layers": 12,
        "decoder_attention_heads": 16,
        "decoder_ffn_dim": 4096,
        "max_position_embeddings": 4096,
        "scale_embedding": False,
    },
}

# Llama-3.1-8B with the rows of a converted checkpoint: 128256 of Llama, `<pad>`, `<image>`, up to a multiple of 64.
LLAMA_3_1_8B = {
    "model_type": "llama",
    "vocab_size": 128320,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


# TEMP
AUTO_MAP = {
    "AutoConfig": "configuration_florence_vl.FlorenceVLConfig",
    "AutoModel": "modeling_florence_vl.FlorenceVLModel",
    "AutoModelForImageTextToText": "modeling_florence_vl.FlorenceVLForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_florence_vl.FlorenceVLForConditionalGeneration",
    "AutoProcessor": "processing_florence_vl.FlorenceVLProcessor",
}


@auto_docstring(
    custom_intro="""
    Configuration of a Florence-VL model: a Florence-2 vision tower, the fusion of its features, a projector and any
    causal language model. The defaults give the architecture of `jiuhai/florence-vl-8b-sft`.
    """
)
@strict
class FlorenceVLConfig(PreTrainedConfig):
    r"""
    vision_config (`Florence2Config` or `dict`, *optional*):
        The whole Florence-2: `vision_config.vision_config` is DaViT, `vision_config.text_config` is BART, of which
        only the encoder is built. Defaults to Florence-2-large.
    text_config (`PreTrainedConfig` or `dict`, *optional*):
        Any causal language model. A `dict` should name its `model_type`; it defaults to Llama.
    image_token_id (`int`, *optional*, defaults to 128257):
        Id of the token whose embeddings are replaced by image features. It is never generated.
    image_size (`int`, *optional*, defaults to 768):
        Height and width of the square that every picture is resized to, in pixels.
    image_feature_source (`list[str]`, *optional*, defaults to `["spatial_avg_pool", "temporal_avg_pool"]`):
        How DaViT's feature map becomes tokens, concatenated in this order: `spatial_avg_pool` (mean over positions, 1
        token), `temporal_avg_pool` (mean over frames, one token per position), `last_frame` (one token per position).
    fusion_strategy (`str`, *optional*, defaults to `"channel"`):
        `channel` concatenates the features along channels, `token` along tokens, `average` takes their mean.
    fusion_features (`list[str]`, *optional*):
        Which features are fused, in order: `image` (V) and names of prompts. Defaults to `image`, then all prompts.
    prompts (`dict[str, str]`, *optional*):
        The prompts that the vision tower reads the image under, by name. Defaults to the paper's `caption`, `ocr` and
        `grounding`.
    prompt_token_ids (`dict[str, list[int]]`, *optional*):
        Token ids of each prompt in Florence-2's vocabulary, with special tokens and, if wanted, padding. Needed for
        every prompt that is not one of the paper's.
    mask_prompt_padding (`bool`, *optional*, defaults to `False`):
        Whether padding within `prompt_token_ids` is hidden from attention. The published checkpoints attend to it.
    projector_depth (`int`, *optional*, defaults to 3):
        Number of linear layers of the projector, with `projector_hidden_act` between them.
    projector_hidden_act (`str`, *optional*, defaults to `"gelu"`):
        Activation between the layers of the projector.

    Example:

    ```python
    >>> from florence_vl_hf import FlorenceVLConfig

    >>> config = FlorenceVLConfig(fusion_features=["image", "caption"])
    >>> config.num_image_tokens, config.fused_hidden_size
    (577, 2048)
    ```"""

    model_type = "florence_vl"
    # Reads configurations of a foreign layout, once set by who knows one: whether it is one, and how.
    foreign_loader: ClassVar[tuple[Callable[..., bool], Callable[..., Any]] | None] = None
    # Transformers 5.23 also knows `sub_configs_defaults`; this older form works in every supported version.
    sub_configs = {"vision_config": Florence2Config, "text_config": AutoConfig}

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 128257
    image_size: int = 768
    image_feature_source: list[str] | tuple[str, ...] = ("spatial_avg_pool", "temporal_avg_pool")
    fusion_strategy: Literal["channel", "token", "average"] = "channel"
    fusion_features: list[str] | tuple[str, ...] | None = None
    prompts: dict[str, str] | None = None
    prompt_token_ids: dict[str, list[int]] | None = None
    mask_prompt_padding: bool = False
    projector_depth: int = 3
    projector_hidden_act: str = "gelu"
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.vision_config, PreTrainedConfig):
            self.vision_config = Florence2Config(
                **(FLORENCE_2_LARGE if self.vision_config is None else self.vision_config)
            )
        if not isinstance(self.text_config, PreTrainedConfig):
            text_config = dict(LLAMA_3_1_8B if self.text_config is None else self.text_config)
            self.text_config = CONFIG_MAPPING[text_config.pop("model_type", "llama")](**text_config)
        if self.prompts is None:
            self.prompts = dict(DEFAULT_PROMPTS)
        self.prompt_token_ids = {**self._default_prompt_token_ids(), **(self.prompt_token_ids or {})}
        if self.fusion_features is None:
            self.fusion_features = [IMAGE_FEATURE, *self.prompts]
        # Language models say themselves whether their head is tied; a composite model is asked at the top.
        self.tie_word_embeddings = self.tie_word_embeddings or self.text_config.tie_word_embeddings

        super().__post_init__(**kwargs)
        self._validate_tower()
        self._validate_fusion()
        self._validate_text()
        # Transformers looks here for the width of `get_image_features(...).last_hidden_state`.
        self.vision_config.out_hidden_size = self.fused_hidden_size

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As in Transformers; with the package installed, also of an original checkpoint as it is."""
        if cls.foreign_loader is not None:
            is_foreign, load_foreign = cls.foreign_loader
            if is_foreign(pretrained_model_name_or_path, **kwargs):
                foreign = load_foreign(pretrained_model_name_or_path, **kwargs)
                return cls.from_dict(foreign.to_dict(), **kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def _default_prompt_token_ids(self) -> dict[str, list[int]]:
        return {
            name: list(DEFAULT_PROMPT_TOKEN_IDS[name])
            for name, text in self.prompts.items()
            if DEFAULT_PROMPTS.get(name) == text
        }

    @property
    def feature_grid_size(self) -> int:
        """Height and width of DaViT's feature map, in positions (24 for a 768 x 768 image)."""
        davit = self.vision_config.vision_config
        size = self.image_size
        for kernel, stride, padding in zip(davit.patch_size, davit.patch_stride, davit.patch_padding, strict=True):
            size = (size + 2 * padding - kernel) // stride + 1
        return size

    @property
    def num_feature_tokens(self) -> int:
        """Tokens of V and of each prompt's features, before the fusion."""
        tokens_of_source = {
            "spatial_avg_pool": 1,
            "temporal_avg_pool": self.feature_grid_size**2,
            "last_frame": self.feature_grid_size**2,
        }
        return sum(tokens_of_source[source] for source in self.image_feature_source)

    @property
    def num_image_tokens(self) -> int:
        """Tokens that one image takes among the language model's inputs."""
        return self.num_feature_tokens * (len(self.fusion_features) if self.fusion_strategy == "token" else 1)

    @property
    def fused_hidden_size(self) -> int:
        """Channels of the fused features, which the projector reads."""
        width = self.vision_config.vision_config.projection_dim
        return width * (len(self.fusion_features) if self.fusion_strategy == "channel" else 1)

    @property
    def fusion_prompts(self) -> list[str]:
        """Names of the prompts that are fused, in order: only these are read."""
        return [name for name in self.fusion_features if name != IMAGE_FEATURE]

    def _validate_tower(self) -> None:
        davit, bart = self.vision_config.vision_config, self.vision_config.text_config
        for name in ("num_heads", "num_groups"):
            divisors = getattr(davit, name)
            if len(divisors) != len(davit.embed_dim) or any(
                width % divisor for width, divisor in zip(davit.embed_dim, divisors, strict=True)
            ):
                raise ValueError(
                    f"DaViT's `{name}` is {list(divisors)}, but its stages have `embed_dim` {list(davit.embed_dim)}; "
                    f"give one number per stage, each of which divides the stage's width."
                )
        if bart.d_model % bart.encoder_attention_heads:
            raise ValueError(
                f"The BART encoder has {bart.d_model} channels (`d_model`), which its {bart.encoder_attention_heads} "
                f"heads (`encoder_attention_heads`) do not divide; change one of them."
            )
        if davit.projection_dim != bart.d_model:
            raise ValueError(
                f"DaViT's features are projected to {davit.projection_dim} channels "
                f"(`vision_config.vision_config.projection_dim`), but the BART encoder that reads them has "
                f"{bart.d_model} (`vision_config.text_config.d_model`); make the two equal."
            )
        known_sources = ("spatial_avg_pool", "temporal_avg_pool", "last_frame")
        unknown_sources = [source for source in self.image_feature_source if source not in known_sources]
        if unknown_sources or not self.image_feature_source:
            raise ValueError(
                f"`image_feature_source` is {list(self.image_feature_source)}; "
                f"give at least one of {list(known_sources)}."
            )
        if self.feature_grid_size < 1:
            raise ValueError(
                f"`image_size` is {self.image_size}, which leaves no feature map; DaViT divides it by about "
                f"{self._total_stride()}. Give a larger one."
            )
        if self.feature_grid_size > davit.max_position_embeddings:
            raise ValueError(
                f"`image_size` is {self.image_size}, a feature map of {self.feature_grid_size} x "
                f"{self.feature_grid_size} positions, but there are only {davit.max_position_embeddings} position "
                f"embeddings (`vision_config.vision_config.max_position_embeddings`). Give a smaller `image_size`."
            )

    def _total_stride(self) -> int:
        total_stride = 1
        for stride in self.vision_config.vision_config.patch_stride:
            total_stride *= stride
        return total_stride

    def _validate_fusion(self) -> None:
        bart = self.vision_config.text_config
        if IMAGE_FEATURE in self.prompts:
            raise ValueError(
                f"A prompt is called {IMAGE_FEATURE!r}, which names the features without any prompt; rename it."
            )
        choices = [IMAGE_FEATURE, *self.prompts]
        features = list(self.fusion_features)
        if not features or len(set(features)) != len(features) or not set(features) <= set(choices):
            raise ValueError(f"`fusion_features` is {features}; give one or more of {choices}, each at most once.")
        if extra := sorted(set(self.prompt_token_ids) - set(self.prompts)):
            raise ValueError(f"`prompt_token_ids` has {extra}, which `prompts` lacks; add them there or drop them.")
        for name in self.prompts:
            token_ids = self.prompt_token_ids.get(name)
            if not token_ids:
                raise ValueError(
                    f"The prompt {name!r} has no token ids; tokenize {self.prompts[name]!r} with Florence-2's "
                    f"tokenizer and give the result as `prompt_token_ids[{name!r}]`."
                )
            if min(token_ids) < 0 or max(token_ids) >= bart.vocab_size:
                raise ValueError(
                    f"`prompt_token_ids[{name!r}]` runs from {min(token_ids)} to {max(token_ids)}, but the BART "
                    f"encoder knows ids 0 to {bart.vocab_size - 1} (`vision_config.text_config.vocab_size`); use the "
                    f"tower's own tokenizer."
                )
        longest_prompt = max((len(self.prompt_token_ids[name]) for name in self.fusion_prompts), default=0)
        if longest_prompt and self.num_feature_tokens + longest_prompt > bart.max_position_embeddings:
            raise ValueError(
                f"The BART encoder reads {self.num_feature_tokens} image tokens and up to {longest_prompt} prompt "
                f"tokens, but has {bart.max_position_embeddings} positions "
                f"(`vision_config.text_config.max_position_embeddings`); lower `image_size` or shorten the prompts."
            )

    def _validate_text(self) -> None:
        if self.projector_depth < 1:
            raise ValueError(f"`projector_depth` is {self.projector_depth}; a projector has at least 1 layer.")
        if self.projector_hidden_act not in ACT2FN:
            raise ValueError(
                f"`projector_hidden_act` is {self.projector_hidden_act!r}, which Transformers does not know; "
                f"give one of {sorted(ACT2FN)}."
            )
        if not 0 <= self.image_token_id < self.text_config.vocab_size:
            raise ValueError(
                f"`image_token_id` is {self.image_token_id}, but the language model knows ids 0 to "
                f"{self.text_config.vocab_size - 1} (`text_config.vocab_size`); choose a row that no text uses."
            )


__all__ = ["FlorenceVLConfig"]
