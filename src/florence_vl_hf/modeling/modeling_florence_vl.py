# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""PyTorch Florence-VL model: a generative vision tower, depth-breadth fusion, a projector and a language model.

Source: Chen et al., "Florence-VL: Enhancing Vision-Language Models with Generative Vision Encoder and Depth-Breadth
Fusion", CVPR 2025 (arXiv 2412.04424).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoModel, Florence2Config, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin, LogitsProcessorList, SuppressTokensLogitsProcessor
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bart.modeling_bart import BartEncoder
from transformers.models.florence2.configuration_florence2 import Florence2VisionConfig
from transformers.models.florence2.modeling_florence2 import (
    Florence2MultiModalProjector,
    Florence2PreTrainedModel,
    Florence2VisionBackbone,
    Florence2VisionBlock,
    Florence2VisionChannelAttention,
    Florence2VisionWindowAttention,
    eager_attention_forward,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple, torch_compilable_check

from .configuration_florence_vl import IMAGE_FEATURE, FlorenceVLConfig
from .transformers_compat import slice_logits_to_keep


@auto_docstring(custom_intro="Everything that the vision tower saw in a batch of images.")
@dataclass
class FlorenceVLVisionOutput(ModelOutput):
    r"""
    image_feature (`torch.Tensor` of shape `(num_images, num_feature_tokens, hidden_size)`):
        V of the paper: DaViT's features, pooled and projected, before any prompt.
    prompt_features (`torch.Tensor` of shape `(num_prompts, num_images, num_feature_tokens, hidden_size)`):
        V't of the paper: the encoder's last states at V's positions, one per prompt. `None` without prompts.
    hidden_states (`tuple(torch.Tensor)`, *optional*):
        DaViT's feature maps, each of shape `(num_images, channels, height, width)`: the input of the first block, then
        the output of each block.
    attentions (`tuple(torch.Tensor)`, *optional*):
        DaViT's attention weights, of each block window then channel attention. Only eager attention has them.
    encoder_hidden_states (`tuple(torch.Tensor)`, *optional*):
        BART's hidden states, each of shape `(num_prompts, num_images, sequence_length, hidden_size)`.
    encoder_attentions (`tuple(torch.Tensor)`, *optional*):
        BART's attention weights, each of shape
        `(num_prompts, num_images, num_heads, sequence_length, sequence_length)`.
    """

    image_feature: torch.Tensor | None = None
    prompt_features: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    encoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    encoder_attentions: tuple[torch.Tensor, ...] | None = None


@auto_docstring(custom_intro="What `get_image_features` returns.")
@dataclass
class FlorenceVLImageFeaturesOutput(BaseModelOutputWithPooling):
    r"""
    last_hidden_state (`torch.Tensor` of shape `(num_images, num_image_tokens, fused_hidden_size)`):
        The fused features, before the projector.
    pooler_output (`list[torch.Tensor]`, one of shape `(num_image_tokens, text_hidden_size)` per image):
        The projected features that the language model reads.
    hidden_states (`tuple(torch.Tensor)`, *optional*):
        DaViT's feature maps, each of shape `(num_images, channels, height, width)`.
    attentions (`tuple(torch.Tensor)`, *optional*):
        DaViT's attention weights, of each block window then channel attention. Only eager attention has them.
    features (`dict[str, torch.Tensor]`):
        The features that were fused, by name and in order (`image`, `caption`, ...), each of shape
        `(num_images, num_feature_tokens, hidden_size)`.
    encoder_hidden_states (`tuple(torch.Tensor)`, *optional*):
        BART's hidden states, each of shape `(num_prompts, num_images, sequence_length, hidden_size)`.
    encoder_attentions (`tuple(torch.Tensor)`, *optional*):
        BART's attention weights, each of shape
        `(num_prompts, num_images, num_heads, sequence_length, sequence_length)`.
    """

    features: dict[str, torch.Tensor] | None = None
    encoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    encoder_attentions: tuple[torch.Tensor, ...] | None = None


@auto_docstring(custom_intro="Base class for Florence-VL outputs, with hidden states and attentions.")
@dataclass
class FlorenceVLModelOutputWithPast(BaseModelOutputWithPast):
    r"""
    past_key_values (`Cache`, *optional*, returned when `use_cache=True` is passed or when `config.use_cache=True`):
        Keys and values of the language model's self-attention, to speed up sequential decoding.
    image_hidden_states (`torch.Tensor` of shape `(num_images * num_image_tokens, text_hidden_size)`, *optional*):
        The projected image features that took the place of the image tokens.
    """

    image_hidden_states: torch.Tensor | None = None


@auto_docstring(custom_intro="Base class for Florence-VL causal language model (or autoregressive) outputs.")
@dataclass
class FlorenceVLCausalLMOutputWithPast(ModelOutput):
    r"""
    loss (`torch.Tensor` of shape `(1,)`, *optional*, returned when `labels` is provided):
        Language modeling loss (for next-token prediction).
    logits (`torch.Tensor` of shape `(batch_size, sequence_length, config.text_config.vocab_size)`):
        Prediction scores of the language modeling head (scores for each vocabulary token before SoftMax).
    past_key_values (`Cache`, *optional*, returned when `use_cache=True` is passed or when `config.use_cache=True`):
        Keys and values of the language model's self-attention, to speed up sequential decoding.
    image_hidden_states (`torch.Tensor` of shape `(num_images * num_image_tokens, text_hidden_size)`, *optional*):
        The projected image features that took the place of the image tokens.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | None = None


class FlorenceVLVisionAttentionCore(nn.Module):
    """The scaled dot product of DaViT's attentions, without weights: a module, so that its attention is recorded.

    `implementations` are those that the caller's shapes allow, the first of which stands in for any other.
    """

    def __init__(self, config: Florence2VisionConfig, implementations: tuple[str, ...] | None = None) -> None:
        super().__init__()
        self.config = config
        self.implementations = implementations
        self.is_causal = False

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        implementation = self.config._attn_implementation
        if self.implementations is not None and implementation not in self.implementations:
            implementation = self.implementations[0]
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        return attention_interface(self, query, key, value, attention_mask=None, scaling=scaling)


class FlorenceVLVisionWindowAttention(Florence2VisionWindowAttention):
    """Attention within windows of positions. As in Florence-2, but its attention weights can be had."""

    def __init__(self, config: Florence2VisionConfig, stage_idx: int) -> None:
        super().__init__(config=config, stage_idx=stage_idx)
        self.core = FlorenceVLVisionAttentionCore(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        batch_size, height, width, dim = hidden_states.shape
        window = self.window_size

        # Parity: the padding of the last windows is attended to, as in Florence-2.
        hidden_states = nn.functional.pad(hidden_states, (0, 0, 0, -width % window, 0, -height % window))
        rows, columns = hidden_states.shape[1] // window, hidden_states.shape[2] // window
        hidden_states = hidden_states.view(batch_size, rows, window, columns, window, dim).transpose(2, 3)
        hidden_states = hidden_states.reshape(-1, window * window, dim)  # (num_windows, window_area, dim)

        qkv = self.qkv(hidden_states).view(-1, window * window, 3, self.num_heads, dim // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (num_windows, num_heads, window_area, head_dim)
        hidden_states, _ = self.core(query, key, value, scaling=self.scale)
        hidden_states = self.proj(hidden_states.reshape(-1, window * window, dim))

        hidden_states = hidden_states.view(batch_size, rows, columns, window, window, dim).transpose(2, 3)
        hidden_states = hidden_states.reshape(batch_size, rows * window, columns * window, dim)
        return hidden_states[:, :height, :width].reshape(batch_size, height * width, dim)


class FlorenceVLVisionChannelAttention(Florence2VisionChannelAttention):
    """Attention between the channels of each group. As in Florence-2, but under every attention implementation."""

    def __init__(self, config: Florence2VisionConfig, stage_idx: int) -> None:
        super().__init__(config=config, stage_idx=stage_idx)
        # A "head dim" here is the number of positions, up to 36864; FlashAttention takes 256.
        self.core = FlorenceVLVisionAttentionCore(config, implementations=("sdpa", "eager"))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        batch_size, num_positions, dim = hidden_states.shape

        qkv = self.qkv(hidden_states).view(batch_size, num_positions, 3, self.groups, dim // self.groups)
        query, key, value = qkv.permute(2, 0, 3, 4, 1).unbind(0)  # (batch_size, groups, channels, num_positions)
        hidden_states, _ = self.core(query, key, value, scaling=num_positions**-0.5)
        hidden_states = hidden_states.permute(0, 3, 2, 1)  # from (batch_size, channels, groups, num_positions)
        return self.proj(hidden_states.reshape(batch_size, num_positions, dim))


class FlorenceVLVisionBlock(GradientCheckpointingLayer, Florence2VisionBlock):
    """A block of DaViT that can be checkpointed, which Florence-2's own cannot."""

    def __init__(
        self,
        config: Florence2VisionConfig,
        stage_idx: int,
        spatial_drop_path_rate: float,
        channel_drop_path_rate: float,
    ) -> None:
        super().__init__(
            config=config,
            stage_idx=stage_idx,
            spatial_drop_path_rate=spatial_drop_path_rate,
            channel_drop_path_rate=channel_drop_path_rate,
        )
        self.spatial_block.window_attn = FlorenceVLVisionWindowAttention(config=config, stage_idx=stage_idx)
        self.channel_block.channel_attn = FlorenceVLVisionChannelAttention(config=config, stage_idx=stage_idx)


class FlorenceVLVisionBackbone(Florence2VisionBackbone):
    """DaViT, with blocks that can be checkpointed, recorded and split over devices."""

    _no_split_modules = ["FlorenceVLVisionBlock"]
    _can_record_outputs = {
        "hidden_states": FlorenceVLVisionBlock,
        "attentions": FlorenceVLVisionAttentionCore,
    }
    supports_gradient_checkpointing = True

    def __init__(self, config: Florence2VisionConfig) -> None:
        super().__init__(config)
        # Stochastic depth grows linearly over the attentions of all blocks, two per block, as in Florence-2.
        drop_path_rates = iter(torch.linspace(0, config.drop_path_rate, 2 * sum(config.depths), device="cpu").tolist())
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                FlorenceVLVisionBlock(config, stage_idx, next(drop_path_rates), next(drop_path_rates))
                for _ in range(depth)
            )
            for stage_idx, depth in enumerate(config.depths)
        )
        self.post_init()


class FlorenceVLImageProjection(Florence2MultiModalProjector):
    """Positions, pooling and projection of DaViT's feature map: the last step to V.

    Florence-2's own, for any choice and order of `image_feature_source`.
    """

    def __init__(self, config: Florence2Config, image_feature_source: list[str]) -> None:
        super().__init__(config)
        self.image_feature_source = list(image_feature_source)

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        feature_map = feature_map + self.image_position_embed(feature_map)  # (num_images, channels, height, width)
        positions = feature_map.flatten(2).transpose(1, 2)  # (num_images, num_positions, channels)
        # An image is a film of one frame: it has temporal position 0, and its mean over frames is that frame.
        # Its buffer stays in float32 where FSDP computes in bfloat16.
        positions = positions + self.visual_temporal_embed(positions[:, :1]).to(positions.dtype)

        pooled = {
            "spatial_avg_pool": positions.mean(dim=1, keepdim=True),
            "temporal_avg_pool": positions,
            "last_frame": positions,
        }
        image_feature = torch.cat([pooled[source] for source in self.image_feature_source], dim=1)
        # (num_images, num_feature_tokens, channels) -> (num_images, num_feature_tokens, hidden_size)
        return self.image_proj_norm(self.image_projection(image_feature))


class FlorenceVLPrompts(nn.Module):
    """Token ids of the prompts that the vision tower reads an image under, padded to one length."""

    def __init__(self, config: FlorenceVLConfig) -> None:
        super().__init__()
        prompts = [config.prompt_token_ids[name] for name in config.fusion_prompts]
        length = max((len(prompt) for prompt in prompts), default=0)
        pad_token_id = config.vision_config.text_config.pad_token_id
        self.token_ids = [prompt + [pad_token_id] * (length - len(prompt)) for prompt in prompts]
        # Parity: the original attends to the padding that stands in its ids; padding that is added here is hidden.
        self.masks = [
            [
                int(i < len(prompt) and not (config.mask_prompt_padding and prompt[i] == pad_token_id))
                for i in range(length)
            ]
            for prompt in prompts
        ]
        self.is_masked = not all(all(mask) for mask in self.masks)
        self.register_buffer("input_ids", torch.tensor(self.token_ids, dtype=torch.long), persistent=False)
        self.register_buffer("attention_mask", torch.tensor(self.masks, dtype=torch.long), persistent=False)

    def reset_buffers(self) -> None:
        """Fill the buffers, which are in no checkpoint, after the model was built on the meta device."""
        init.copy_(self.input_ids, torch.tensor(self.token_ids, dtype=torch.long))
        init.copy_(self.attention_mask, torch.tensor(self.masks, dtype=torch.long))

    def forward(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        # Both (num_prompts, prompt_length). No mask where nothing is hidden: attention is faster without.
        return self.input_ids, self.attention_mask if self.is_masked else None


class FlorenceVLVisionTower(Florence2PreTrainedModel):
    """Florence-2 without its decoder: looks at images once and reads them under several prompts."""

    _no_split_modules = ["FlorenceVLImageProjection"]
    # Not Florence-2's: the decoder and its ties are never built.
    _tied_weights_keys = None

    def __init__(self, config: Florence2Config, image_feature_source: list[str], image_size: int) -> None:
        super().__init__(config)
        self.image_shape = (config.vision_config.in_channels, image_size, image_size)
        self.backbone = FlorenceVLVisionBackbone(config.vision_config)
        self.image_projector = FlorenceVLImageProjection(config, image_feature_source)
        self.encoder = BartEncoder(config.text_config)
        self.post_init()
        # BART's, but its decoder is never built, and FSDP refuses names that it does not find.
        self._no_split_modules.discard("BartDecoderLayer")

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.embed_tokens = value

    def forward(
        self,
        pixel_values: torch.Tensor,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> FlorenceVLVisionOutput:
        r"""
        pixel_values (`torch.Tensor` of shape `(num_images, 3, image_size, image_size)`):
            Normalised images.
        prompt_ids (`torch.Tensor` of shape `(num_prompts, prompt_length)`):
            Token ids of the prompts, in Florence-2's vocabulary. There may be none.
        prompt_mask (`torch.Tensor` of shape `(num_prompts, prompt_length)`, *optional*):
            1 where a prompt's token is attended to, 0 where it is hidden.
        """
        # Here, so that an exported tower knows height and width: with symbols for them, its export takes minutes.
        if tuple(pixel_values.shape[1:]) != self.image_shape:
            raise ValueError(
                f"Got `pixel_values` of shape {tuple(pixel_values.shape)}, expected (num_images, "
                f"{', '.join(map(str, self.image_shape))}); let `FlorenceVLProcessor` make them, or change "
                f"`config.image_size`."
            )
        davit = self.backbone(pixel_values, return_dict=True, **kwargs)
        image_feature = self.image_projector(davit.last_hidden_state)  # (num_images, num_feature_tokens, hidden_size)
        output = FlorenceVLVisionOutput(
            image_feature=image_feature, hidden_states=davit.hidden_states, attentions=davit.attentions
        )
        num_prompts, (num_images, num_feature_tokens, _) = prompt_ids.shape[0], image_feature.shape
        if num_prompts == 0:
            return output

        # Every prompt with every image in one batch: (num_prompts * num_images, num_feature_tokens + prompt_length).
        prompt_embeds = self.encoder.embed_tokens(prompt_ids).to(image_feature.device, image_feature.dtype)
        inputs_embeds = torch.cat(
            [image_feature.repeat(num_prompts, 1, 1), prompt_embeds.repeat_interleave(num_images, dim=0)], dim=1
        )
        attention_mask = None
        if prompt_mask is not None:
            image_mask = prompt_mask.new_ones(num_prompts * num_images, num_feature_tokens)
            attention_mask = torch.cat([image_mask, prompt_mask.repeat_interleave(num_images, dim=0)], dim=1)
        encoded = self.encoder(inputs_embeds=inputs_embeds, attention_mask=attention_mask, return_dict=True, **kwargs)

        def by_prompt(states: tuple[torch.Tensor, ...] | None) -> tuple[torch.Tensor, ...] | None:
            return None if states is None else tuple(state.unflatten(0, (num_prompts, num_images)) for state in states)

        # (num_prompts, num_images, num_feature_tokens, hidden_size)
        output.prompt_features = encoded.last_hidden_state.unflatten(0, (num_prompts, num_images))[
            :, :, :num_feature_tokens
        ]
        output.encoder_hidden_states = by_prompt(encoded.hidden_states)
        output.encoder_attentions = by_prompt(encoded.attentions)
        return output


class FlorenceVLFusion(nn.Module):
    """DBFusion, the depth-breadth fusion of the paper: several features of one image become one."""

    def __init__(self, config: FlorenceVLConfig) -> None:
        super().__init__()
        self.strategy = config.fusion_strategy

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        if self.strategy == "channel":
            return torch.cat(features, dim=-1)  # (num_images, num_feature_tokens, num_features * hidden_size)
        if self.strategy == "token":
            return torch.cat(features, dim=1)  # (num_images, num_features * num_feature_tokens, hidden_size)
        return torch.stack(features).mean(dim=0)  # (num_images, num_feature_tokens, hidden_size)


class FlorenceVLMultiModalProjector(nn.Module):
    """The MLP that hands the fused features to the language model."""

    def __init__(self, config: FlorenceVLConfig) -> None:
        super().__init__()
        hidden_size = config.text_config.hidden_size
        self.layers = nn.ModuleList(
            nn.Linear(config.fused_hidden_size if i == 0 else hidden_size, hidden_size)
            for i in range(config.projector_depth)
        )
        self.act = ACT2FN[config.projector_hidden_act]

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        # (num_images, num_image_tokens, fused_hidden_size) -> (num_images, num_image_tokens, text_hidden_size)
        hidden_states = self.layers[0](image_features)
        for layer in self.layers[1:]:
            hidden_states = layer(self.act(hidden_states))
        return hidden_states


@auto_docstring
class FlorenceVLPreTrainedModel(PreTrainedModel):
    config: FlorenceVLConfig
    config_class = FlorenceVLConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]

    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    # Loads checkpoints of a foreign layout, once set by who knows one: whether it is one, and how.
    foreign_loader: ClassVar[tuple[Callable[..., bool], Callable[..., Any]] | None] = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """As in Transformers; with the package installed, also of an original checkpoint as it is."""
        load = super().from_pretrained
        if cls.foreign_loader is not None:
            is_foreign, load_foreign = cls.foreign_loader
            if is_foreign(pretrained_model_name_or_path, **kwargs):
                return load_foreign(load, cls, pretrained_model_name_or_path, **kwargs)
        return load(pretrained_model_name_or_path, *model_args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FlorenceVLPrompts):
            module.reset_buffers()


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


@auto_docstring(
    custom_intro="""
    The Florence-VL model: a vision tower that reads each image under several prompts, the fusion of what it saw, a
    projector and a language model, without a language modeling head.
    """
)
class FlorenceVLModel(FlorenceVLPreTrainedModel):
    def __init__(self, config: FlorenceVLConfig) -> None:
        super().__init__(config)
        self.vision_tower = FlorenceVLVisionTower(config.vision_config, config.image_feature_source, config.image_size)
        self.prompts = FlorenceVLPrompts(config)
        self.fusion = FlorenceVLFusion(config)
        self.multi_modal_projector = FlorenceVLMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def train(self, mode: bool = True) -> "FlorenceVLModel":
        """As in PyTorch; but a part of which no parameter is trained stays in evaluation mode, without dropout."""
        super().train(mode)
        for part in (self.vision_tower, self.multi_modal_projector, self.language_model):
            if not _is_trained(part):
                part.eval()
        # Gradients pass through a frozen language model to the projector, and only layers in training mode are
        # checkpointed. What a layer holds, dropout above all, stays as it is.
        for layer in self.language_model.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.training = mode
        return self

    @can_return_tuple
    @auto_docstring(custom_intro="Looks at images: the tower's features, their fusion, and its projection.")
    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | FlorenceVLImageFeaturesOutput:
        r"""
        pixel_values (`torch.Tensor` of shape `(num_images, 3, image_size, image_size)`):
            Normalised images.
        """
        for recorded in ("output_hidden_states", "output_attentions"):
            kwargs.setdefault(recorded, getattr(self.config, recorded))

        prompt_ids, prompt_mask = self.prompts()
        # Adapters and checkpointing ask all embeddings for gradients, the prompts' too. A frozen tower keeps nothing.
        needs_gradients = pixel_values.requires_grad or _is_trained(self.vision_tower)
        with torch.set_grad_enabled(torch.is_grad_enabled() and needs_gradients):
            seen = self.vision_tower(pixel_values, prompt_ids, prompt_mask, **kwargs)
        named_features = {IMAGE_FEATURE: seen.image_feature}
        if seen.prompt_features is not None:
            named_features.update(zip(self.config.fusion_prompts, seen.prompt_features, strict=True))
        features = {name: named_features[name] for name in self.config.fusion_features}

        fused = self.fusion(list(features.values()))  # (num_images, num_image_tokens, fused_hidden_size)
        projected = self.multi_modal_projector(fused)  # (num_images, num_image_tokens, text_hidden_size)
        return FlorenceVLImageFeaturesOutput(
            last_hidden_state=fused,
            pooler_output=list(projected),
            hidden_states=seen.hidden_states,
            attentions=seen.attentions,
            features=features,
            encoder_hidden_states=seen.encoder_hidden_states,
            encoder_attentions=seen.encoder_attentions,
        )

    def get_placeholder_mask(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor,
        image_features: torch.Tensor,
    ) -> torch.BoolTensor:
        """
        Finds the image tokens, by id or by embedding, and checks that there are as many as image features.

        Returns a mask of shape `(batch_size, sequence_length, 1)`.
        """
        if input_ids is None:
            image_token_id = torch.full((), self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device)
            image_mask = (inputs_embeds == self.get_input_embeddings()(image_token_id)).all(-1)
        else:
            image_mask = input_ids == self.config.image_token_id

        num_image_tokens, num_features = image_mask.sum(), image_features.shape[0]
        torch_compilable_check(
            num_image_tokens == num_features,
            f"Image features and image tokens do not match, tokens: {num_image_tokens}, features: {num_features}. "
            f"Each image needs {self.config.num_image_tokens} tokens; let `FlorenceVLProcessor` place them, and do "
            f"not truncate them.",
        )
        return image_mask.unsqueeze(-1).to(inputs_embeds.device)

    def _needs_weightless_image(self, past_key_values: Cache | None) -> bool:
        """Whether tower and projector must be used although there is no image.

        In training, so that what is trained of them has gradients, in every process, and the same (zero, not none: an
        optimizer with momentum tells them apart) in one process as in many. Where weights are divided, so that no
        process waits for another one's share; but for the steps of `generate` after the first, which show no images.
        """
        is_trained = _is_trained(self.vision_tower) or _is_trained(self.multi_modal_projector)
        is_needed = (self.training and is_trained) or self._is_sharded()
        return is_needed and (past_key_values is None or past_key_values.get_seq_length() == 0)

    def _is_sharded(self) -> bool:
        """Whether processes gather each other's weights, layer by layer."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return False
        # Not `is_fsdp_enabled` of Transformers, which means FSDP1 with `cpu_ram_efficient_loading`.
        from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

        is_fsdp = any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in self.modules())
        return torch.distributed.get_world_size() > 1 and (is_fsdp or is_deepspeed_zero3_enabled())

    def _weightless_image_feature(self) -> torch.Tensor:
        """A black image's feature times zero, of shape `(1, text_hidden_size)`: no value or gradient changes."""
        # Not the tower's `dtype`: layers that FSDP has divided are kept in float32 and computed in another type.
        weight = next(self.vision_tower.backbone.convs.parameters())
        pixel_values = torch.zeros((1, *self.vision_tower.image_shape), dtype=weight.dtype, device=weight.device)
        return 0 * self.get_image_features(pixel_values, return_dict=True).pooler_output[0][:1]

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, FlorenceVLImageFeaturesOutput] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | FlorenceVLModelOutputWithPast:
        r"""
        mm_encoder_outputs (`dict[str, FlorenceVLImageFeaturesOutput]`, *optional*):
            Under `"image"`, what `get_image_features` returned for the images of this batch, so that they are not
            encoded again. Excludes `pixel_values`.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if pixel_values is not None and mm_encoder_outputs is not None:
            raise ValueError("You cannot specify both pixel_values and mm_encoder_outputs at the same time")

        # The tower before the embeddings, as `generate` has it: all processes gather weights in one order.
        image_outputs = (mm_encoder_outputs or {}).get("image")
        weightless_feature = None
        if pixel_values is not None:
            image_outputs = self.get_image_features(pixel_values=pixel_values, return_dict=True)
        elif image_outputs is None and self._needs_weightless_image(past_key_values):
            weightless_feature = self._weightless_image_feature()

        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        image_features = None
        if image_outputs is not None:
            # (num_images * num_image_tokens, text_hidden_size)
            image_features = torch.cat(list(image_outputs.pooler_output)).to(inputs_embeds.device, inputs_embeds.dtype)
            image_mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_features)
            inputs_embeds = inputs_embeds.masked_scatter(image_mask, image_features)
        elif weightless_feature is not None:
            inputs_embeds = inputs_embeds + weightless_feature.to(inputs_embeds.device, inputs_embeds.dtype)

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return FlorenceVLModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
        )


@auto_docstring(custom_intro="The Florence-VL model with a language modeling head: looks at pictures and answers.")
class FlorenceVLForConditionalGeneration(FlorenceVLPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: FlorenceVLConfig) -> None:
        super().__init__(config)
        self.model = FlorenceVLModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    @auto_docstring
    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | FlorenceVLImageFeaturesOutput:
        r"""
        pixel_values (`torch.Tensor` of shape `(num_images, 3, image_size, image_size)`):
            Normalised images.
        """
        return self.model.get_image_features(pixel_values=pixel_values, **kwargs)

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, FlorenceVLImageFeaturesOutput] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | FlorenceVLCausalLMOutputWithPast:
        r"""
        mm_encoder_outputs (`dict[str, FlorenceVLImageFeaturesOutput]`, *optional*):
            Under `"image"`, what `get_image_features` returned for the images of this batch, so that they are not
            encoded again. Excludes `pixel_values`.

        Example:

        ```python
        >>> from florence_vl_hf import FlorenceVLForConditionalGeneration, FlorenceVLProcessor

        >>> processor = FlorenceVLProcessor.from_pretrained("florence-vl-8b-sft-hf")
        >>> model = FlorenceVLForConditionalGeneration.from_pretrained("florence-vl-8b-sft-hf")

        >>> content = [{"type": "image", "path": "street.jpg"}, {"type": "text", "text": "What is shown?"}]
        >>> inputs = processor.apply_chat_template(
        ...     [{"role": "user", "content": content}],
        ...     tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt",
        ... )
        >>> answer = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
        >>> processor.decode(answer, skip_special_tokens=True)
        ```"""
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )

        hidden_states = slice_logits_to_keep(outputs[0], logits_to_keep)
        logits = self.lm_head(hidden_states)

        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )

        return FlorenceVLCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    def _get_logits_processor(self, *args, **kwargs) -> LogitsProcessorList:
        # Here and not in the generation config, which users replace: an image token without an image cannot be read.
        processors = super()._get_logits_processor(*args, **kwargs)
        processors.append(SuppressTokensLogitsProcessor([self.config.image_token_id], device=self.device))
        return processors


__all__ = ["FlorenceVLForConditionalGeneration", "FlorenceVLModel", "FlorenceVLPreTrainedModel"]
