# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License. You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Configuration of Florence-VL. Every number that the model and the processor share is derived here."""

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, Florence2Config, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.utils import auto_docstring


# Name of V, the features of the image without a prompt, beside the names of the prompts.
IMAGE_FEATURE = "image"

# The prompts of the paper. Parity: the original keeps these ids as constants, padded with 1 to one length.
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

# Florence-2-large, the vision tower of every published Florence-VL.
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

# Llama-3.1-8B with the vocabulary of a converted checkpoint: 128256 tokens of Llama, `<pad>`, `<image>`, padded to a
# multiple of 64.
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


IMAGE_FEATURE_SOURCES = ("spatial_avg_pool", "temporal_avg_pool", "last_frame")

# Written into every config.json: the module and class of each Auto class, for `trust_remote_code=True`.
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
        Configuration of Florence-2: `vision_config.vision_config` is DaViT, `vision_config.text_config` is BART, of
        which only the encoder is built. Defaults to Florence-2-large.
    text_config (`PreTrainedConfig` or `dict`, *optional*):
        Configuration of any causal language model. A `dict` should contain `model_type`. Defaults to Llama-3.1-8B.
    image_token_id (`int`, *optional*, defaults to 128257):
        Id of the image token, whose embeddings are replaced by image features. It is never generated.
    image_size (`int`, *optional*, defaults to 768):
        Height and width of the resized images, in pixels.
    image_feature_source (`list[str]`, *optional*, defaults to `["spatial_avg_pool", "temporal_avg_pool"]`):
        How DaViT's feature map becomes tokens, concatenated in this order: `spatial_avg_pool` (mean over positions, 1
        token), `temporal_avg_pool` (mean over frames, one token per position), `last_frame` (one token per position).
    fusion_strategy (`str`, *optional*, defaults to `"channel"`):
        `channel` concatenates the features along channels, `token` along tokens, `average` computes their mean.
    fusion_features (`list[str]`, *optional*):
        Which features are fused, in order: `image` (V) and names of prompts. Defaults to `image`, then all prompts.
    prompts (`dict[str, str]`, *optional*):
        Prompts of the vision tower, by name. Defaults to `caption`, `ocr` and `grounding` of the paper.
    prompt_token_ids (`dict[str, list[int]]`, *optional*):
        Token ids of each prompt in Florence-2's vocabulary, with special tokens and optionally padding. Required for
        every prompt that is not one of the paper's.
    mask_prompt_padding (`bool`, *optional*, defaults to `False`):
        Whether to mask padding within `prompt_token_ids`. The published checkpoints attend to it.
    projector_depth (`int`, *optional*, defaults to 3):
        Number of linear layers of the projector.
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
    # Transformers 5.23 prefers `sub_configs_defaults`; this form works in every supported version.
    sub_configs: ClassVar[dict[str, type]] = {"vision_config": Florence2Config, "text_config": AutoConfig}

    # Given as a `dict`, as a configuration or as `None`; configurations after `__post_init__`.
    vision_config: Any = None
    text_config: Any = None
    image_token_id: int = 128257
    image_size: int = 768
    image_feature_source: list[str] | tuple[str, ...] = ("spatial_avg_pool", "temporal_avg_pool")
    fusion_strategy: Literal["channel", "token", "average"] = "channel"
    if TYPE_CHECKING:  # after `__post_init__`, which replaces `None`
        fusion_features: list[str]
        prompts: dict[str, str]
        prompt_token_ids: dict[str, list[int]]

        def __init__(self, **kwargs: Any) -> None: ...
    else:
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
        self.prompts = dict(DEFAULT_PROMPTS) if self.prompts is None else self.prompts
        defaults = {
            name: list(DEFAULT_PROMPT_TOKEN_IDS[name])
            for name, prompt in self.prompts.items()
            if DEFAULT_PROMPTS.get(name) == prompt
        }
        self.prompt_token_ids = defaults | (self.prompt_token_ids or {})
        all_features = [IMAGE_FEATURE, *self.prompts]
        self.fusion_features = all_features if self.fusion_features is None else self.fusion_features
        # Transformers reads this flag from the outer configuration only.
        self.tie_word_embeddings = self.tie_word_embeddings or self.text_config.tie_word_embeddings

        super().__post_init__(**kwargs)
        self._validate_tower()
        self._validate_fusion()
        self._validate_text()
        # Overrides the map of a loaded config.json, which may name the repository that it was loaded from.
        self.auto_map = dict(AUTO_MAP)
        # Transformers reads the width of `get_image_features(...).last_hidden_state` from here.
        self.vision_config.out_hidden_size = self.fused_hidden_size

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
        """Number of tokens of V and of each V't, before the fusion."""
        num_positions = self.feature_grid_size**2
        return sum(1 if source == "spatial_avg_pool" else num_positions for source in self.image_feature_source)

    @property
    def num_image_tokens(self) -> int:
        """Number of image tokens per image in the inputs of the language model."""
        return self.num_feature_tokens * (len(self.fusion_features) if self.fusion_strategy == "token" else 1)

    @property
    def fused_hidden_size(self) -> int:
        """Channels of the fused features, the input of the projector."""
        width = self.vision_config.vision_config.projection_dim
        return width * (len(self.fusion_features) if self.fusion_strategy == "channel" else 1)

    @property
    def fusion_prompts(self) -> list[str]:
        """Names of the prompts that are fused, in order. The vision tower reads only these."""
        return [name for name in self.fusion_features if name != IMAGE_FEATURE]

    def _validate_tower(self) -> None:
        davit, bart = self.vision_config.vision_config, self.vision_config.text_config
        for name in ("num_heads", "num_groups"):
            divisors = getattr(davit, name)
            if len(divisors) != len(davit.embed_dim) or any(
                width % divisor for width, divisor in zip(davit.embed_dim, divisors, strict=True)
            ):
                raise ValueError(
                    f"`{name}` of DaViT is {list(divisors)} but `embed_dim` is {list(davit.embed_dim)}; give one "
                    f"number per entry of `embed_dim`, each of which divides it."
                )
        if bart.d_model % bart.encoder_attention_heads:
            raise ValueError(
                f"`d_model` of BART is {bart.d_model}, which is not divisible by `encoder_attention_heads`, "
                f"{bart.encoder_attention_heads}; change one of them."
            )
        if davit.projection_dim != bart.d_model:
            raise ValueError(
                f"`vision_config.vision_config.projection_dim` is {davit.projection_dim} but "
                f"`vision_config.text_config.d_model` is {bart.d_model}; make them equal."
            )
        if not self.image_feature_source or not set(self.image_feature_source) <= set(IMAGE_FEATURE_SOURCES):
            raise ValueError(
                f"`image_feature_source` is {list(self.image_feature_source)}; give at least one of "
                f"{', '.join(IMAGE_FEATURE_SOURCES)}."
            )
        if self.feature_grid_size < 1:
            raise ValueError(
                f"`image_size` is {self.image_size}, which leaves no feature map: DaViT divides it by about "
                f"{math.prod(davit.patch_stride)}. Give a larger one."
            )
        if self.feature_grid_size > davit.max_position_embeddings:
            raise ValueError(
                f"`image_size` is {self.image_size}, a feature map of {self.feature_grid_size} x "
                f"{self.feature_grid_size} positions, but there are only {davit.max_position_embeddings} position "
                f"embeddings (`vision_config.vision_config.max_position_embeddings`). Give a smaller `image_size`."
            )

    def _validate_fusion(self) -> None:
        bart = self.vision_config.text_config
        if IMAGE_FEATURE in self.prompts:
            raise ValueError(
                f"A prompt is named {IMAGE_FEATURE!r}, the name of the features without a prompt; rename the prompt."
            )
        choices = [IMAGE_FEATURE, *self.prompts]
        features = list(self.fusion_features)
        if not features or len(set(features)) != len(features) or not set(features) <= set(choices):
            raise ValueError(f"`fusion_features` is {features}; give one or more of {choices}, each at most once.")
        if extra := sorted(set(self.prompt_token_ids) - set(self.prompts)):
            raise ValueError(f"`prompt_token_ids` has {extra}, which `prompts` lacks; add them there or remove them.")
        for name in self.prompts:
            token_ids = self.prompt_token_ids.get(name)
            if not token_ids:
                raise ValueError(
                    f"The prompt {name!r} has no token ids; tokenize {self.prompts[name]!r} with Florence-2's "
                    f"tokenizer and give the result as `prompt_token_ids[{name!r}]`."
                )
            if min(token_ids) < 0 or max(token_ids) >= bart.vocab_size:
                raise ValueError(
                    f"`prompt_token_ids[{name!r}]` contains ids from {min(token_ids)} to {max(token_ids)}, but the "
                    f"vocabulary of BART has ids 0 to {bart.vocab_size - 1} (`vision_config.text_config.vocab_size`); "
                    f"use Florence-2's tokenizer."
                )
        longest_prompt = max((len(self.prompt_token_ids[name]) for name in self.fusion_prompts), default=0)
        if longest_prompt and self.num_feature_tokens + longest_prompt > bart.max_position_embeddings:
            raise ValueError(
                f"BART's encoder gets {self.num_feature_tokens} image tokens and up to {longest_prompt} prompt "
                f"tokens, but has {bart.max_position_embeddings} positions "
                f"(`vision_config.text_config.max_position_embeddings`); reduce `image_size` or shorten the prompts."
            )

    def _validate_text(self) -> None:
        if self.projector_depth < 1:
            raise ValueError(f"`projector_depth` is {self.projector_depth}; it must be at least 1.")
        if self.projector_hidden_act not in ACT2FN:
            raise ValueError(
                f"`projector_hidden_act` is {self.projector_hidden_act!r}, which Transformers does not know; "
                f"give one of {sorted(ACT2FN)}."
            )
        if not 0 <= self.image_token_id < self.text_config.vocab_size:
            raise ValueError(
                f"`image_token_id` is {self.image_token_id}, but the language model has token ids 0 to "
                f"{self.text_config.vocab_size - 1} (`text_config.vocab_size`); give one that no text uses."
            )


# `save_pretrained` copies this module beside config.json.
FlorenceVLConfig.register_for_auto_class()

__all__ = ["FlorenceVLConfig"]
