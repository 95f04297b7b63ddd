# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License. You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""PyTorch Florence-VL model: a generative vision tower, depth-breadth fusion, a projector and a language model.

Source: Chen et al., "Florence-VL: Enhancing Vision-Language Models with Generative Vision Encoder and Depth-Breadth
Fusion", CVPR 2025 (arXiv 2412.04424).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, Cache, Florence2Config, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bart.modeling_bart import BartAttention, BartEncoder
from transformers.models.florence2.configuration_florence2 import Florence2VisionConfig
from transformers.models.florence2.modeling_florence2 import (
    Florence2DropPath,
    Florence2MultiModalProjector,
    Florence2PreTrainedModel,
    Florence2VisionConvEmbed,
    Florence2VisionMLP,
    Florence2VisionPreTrainedModel,
    eager_attention_forward,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple, torch_compilable_check
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_florence_vl import IMAGE_FEATURE, FlorenceVLConfig
from .generation_florence_vl import FlorenceVLGenerationMixin
from .transformers_compat import CACHE, slice_logits_to_keep


# Positions that channel attention sums in one float32 chain. Sums over blocks, and then over their sums, are more
# exact than one chain over all positions, 36,864 in the first block group of a 768 x 768 image.
CHANNEL_ATTENTION_BLOCK = 64


@auto_docstring(custom_intro="Output of the vision tower and of `get_image_features`.")
@dataclass
class FlorenceVLImageFeaturesOutput(BaseModelOutputWithPooling):
    r"""
    last_hidden_state (`torch.Tensor` of shape `(num_images, num_image_tokens, fused_hidden_size)`):
        Fused features, before the projector. `None` in the output of the vision tower.
    pooler_output (`list[torch.Tensor]`, one of shape `(num_image_tokens, text_hidden_size)` per image):
        Projected features, the inputs of the language model. `None` in the output of the vision tower.
    hidden_states (`tuple(torch.Tensor)`, *optional*):
        Feature maps of DaViT, each of shape `(num_images, channels, height, width)`: the input of the first block,
        then the output of each block.
    attentions (`tuple(torch.Tensor)`, *optional*):
        Attention weights of DaViT, window attention and channel attention of each block.
    features (`dict[str, torch.Tensor]`):
        V (under `"image"`) and V't of each prompt (under the prompt's name), each of shape
        `(num_images, num_feature_tokens, hidden_size)`. `get_image_features` returns those that are fused, in order.
    encoder_hidden_states (`tuple(torch.Tensor)`, *optional*):
        Hidden states of BART's encoder, each of shape `(num_prompts, num_images, sequence_length, hidden_size)`.
    encoder_attentions (`tuple(torch.Tensor)`, *optional*):
        Attention weights of BART's encoder, each of shape
        `(num_prompts, num_images, num_heads, sequence_length, sequence_length)`.
    """

    pooler_output: Any = None
    features: dict[str, torch.Tensor] | None = None
    encoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    encoder_attentions: tuple[torch.Tensor, ...] | None = None


@auto_docstring(custom_intro="Output of the model without a language modeling head.")
@dataclass
class FlorenceVLModelOutputWithPast(BaseModelOutputWithPast):
    r"""
    image_hidden_states (`torch.Tensor` of shape `(num_images * num_image_tokens, text_hidden_size)`, *optional*):
        Projected image features, which replaced the embeddings of the image tokens.
    image_outputs (`FlorenceVLImageFeaturesOutput`, *optional*):
        Output of `get_image_features` for the images of the batch.
    """

    image_hidden_states: torch.Tensor | None = None
    image_outputs: FlorenceVLImageFeaturesOutput | None = None


@auto_docstring(custom_intro="Output of the model with a language modeling head.")
@dataclass
class FlorenceVLCausalLMOutputWithPast(CausalLMOutputWithPast):
    r"""
    image_hidden_states (`torch.Tensor` of shape `(num_images * num_image_tokens, text_hidden_size)`, *optional*):
        Projected image features, which replaced the embeddings of the image tokens.
    image_outputs (`FlorenceVLImageFeaturesOutput`, *optional*):
        Output of `get_image_features` for the images of the batch.
    """

    image_hidden_states: torch.Tensor | None = None
    image_outputs: FlorenceVLImageFeaturesOutput | None = None


class FlorenceVLVisionWindowAttention(nn.Module):
    """Attention between the positions of each window of DaViT's feature map."""

    def __init__(self, config: Florence2VisionConfig, stage_idx: int) -> None:
        super().__init__()
        self.config = config
        self.window_size = config.window_size
        self.num_heads = config.num_heads[stage_idx]
        dim = config.embed_dim[stage_idx]
        self.scaling = (dim // self.num_heads) ** -0.5
        self.is_causal = False
        self.qkv = nn.Linear(dim, dim * 3, bias=config.qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        num_images, height, width, dim = hidden_states.shape
        window = self.window_size

        if height % window or width % window:  # padding by nothing would copy
            # Parity: the padding of the last windows is attended to, as in Florence-2.
            hidden_states = nn.functional.pad(hidden_states, (0, 0, 0, -width % window, 0, -height % window))
        rows, columns = hidden_states.shape[1] // window, hidden_states.shape[2] // window
        hidden_states = hidden_states.view(num_images, rows, window, columns, window, dim).transpose(2, 3)
        hidden_states = hidden_states.reshape(-1, window * window, dim)  # (num_windows, window_area, dim)

        qkv = self.qkv(hidden_states).view(-1, window * window, 3, self.num_heads, dim // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (num_windows, num_heads, window_area, head_dim)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        hidden_states, attention_weights = attention_interface(
            self, query, key, value, attention_mask=None, scaling=self.scaling
        )
        hidden_states = self.proj(hidden_states.reshape(-1, window * window, dim))

        hidden_states = hidden_states.view(num_images, rows, columns, window, window, dim).transpose(2, 3)
        hidden_states = hidden_states.reshape(num_images, rows * window, columns * window, dim)
        return hidden_states[:, :height, :width], attention_weights  # (num_images, height, width, dim)


class FlorenceVLVisionChannelAttention(nn.Module):
    """Attention between the channels of each group of DaViT's feature map, the same for every implementation."""

    def __init__(self, config: Florence2VisionConfig, stage_idx: int) -> None:
        super().__init__()
        self.num_groups = config.num_groups[stage_idx]
        dim = config.embed_dim[stage_idx]
        self.qkv = nn.Linear(dim, dim * 3, bias=config.qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        num_images, height, width, dim = hidden_states.shape
        num_positions = height * width

        qkv = self.qkv(hidden_states).view(num_images, num_positions, 3, self.num_groups, dim // self.num_groups)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (num_images, groups, num_positions, channels)

        if num_padding := -num_positions % CHANNEL_ATTENTION_BLOCK:
            query, key = (nn.functional.pad(states, (0, 0, 0, num_padding)) for states in (query, key))
        query = query.unflatten(2, (-1, CHANNEL_ATTENTION_BLOCK))
        key = key.unflatten(2, (-1, CHANNEL_ATTENTION_BLOCK))
        scores = (query.transpose(-1, -2) @ key).sum(dim=2)  # (num_images, groups, channels, channels)
        attention_weights = (scores * num_positions**-0.5).softmax(dim=-1)

        hidden_states = value @ attention_weights.transpose(-1, -2)  # (num_images, groups, num_positions, channels)
        hidden_states = hidden_states.transpose(1, 2).reshape(num_images, height, width, dim)
        return self.proj(hidden_states), attention_weights


class FlorenceVLVisionAttentionBlock(nn.Module):
    """Convolution, attention, convolution and MLP, each with a residual connection. Subclasses name the attention."""

    def __init__(self, config: Florence2VisionConfig, stage_idx: int, drop_path_rate: float) -> None:
        super().__init__()
        dim = config.embed_dim[stage_idx]
        self.conv1 = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)
        self.norm1 = nn.LayerNorm(dim)
        self.drop_path1 = Florence2DropPath(drop_path_rate)
        self.conv2 = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)
        self.norm2 = nn.LayerNorm(dim)
        self.ffn = Florence2VisionMLP(config, stage_idx)
        self.drop_path2 = Florence2DropPath(drop_path_rate)

    def attention(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        raise NotImplementedError

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # Permuting changes the strides only: all values stay in (num_images, height, width, channels) order in memory.
        hidden_states = hidden_states + self.conv1(hidden_states)  # (num_images, channels, height, width)
        hidden_states = hidden_states.permute(0, 2, 3, 1)
        hidden_states = hidden_states + self.drop_path1(self.attention(self.norm1(hidden_states))[0])

        hidden_states = hidden_states.permute(0, 3, 1, 2)
        hidden_states = hidden_states + self.conv2(hidden_states)
        hidden_states = hidden_states.permute(0, 2, 3, 1)
        hidden_states = hidden_states + self.drop_path2(self.ffn(self.norm2(hidden_states)))
        return hidden_states.permute(0, 3, 1, 2)


class FlorenceVLVisionSpatialBlock(FlorenceVLVisionAttentionBlock):
    def __init__(self, config: Florence2VisionConfig, stage_idx: int, drop_path_rate: float) -> None:
        super().__init__(config, stage_idx, drop_path_rate)
        self.window_attn = FlorenceVLVisionWindowAttention(config, stage_idx)

    def attention(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.window_attn(hidden_states)


class FlorenceVLVisionChannelBlock(FlorenceVLVisionAttentionBlock):
    def __init__(self, config: Florence2VisionConfig, stage_idx: int, drop_path_rate: float) -> None:
        super().__init__(config, stage_idx, drop_path_rate)
        self.channel_attn = FlorenceVLVisionChannelAttention(config, stage_idx)

    def attention(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.channel_attn(hidden_states)


class FlorenceVLVisionBlock(GradientCheckpointingLayer):
    """Block of DaViT, which gradient checkpointing recomputes (upstream's Florence-2 has no such layer)."""

    def __init__(
        self,
        config: Florence2VisionConfig,
        stage_idx: int,
        spatial_drop_path_rate: float,
        channel_drop_path_rate: float,
    ) -> None:
        super().__init__()
        self.spatial_block = FlorenceVLVisionSpatialBlock(config, stage_idx, spatial_drop_path_rate)
        self.channel_block = FlorenceVLVisionChannelBlock(config, stage_idx, channel_drop_path_rate)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.channel_block(self.spatial_block(hidden_states))


@auto_docstring(custom_intro="DaViT, the image encoder of Florence-2.")
class FlorenceVLVisionBackbone(Florence2VisionPreTrainedModel):
    _no_split_modules = ["FlorenceVLVisionBlock"]
    _can_record_outputs = {
        "hidden_states": FlorenceVLVisionBlock,
        "attentions": [FlorenceVLVisionWindowAttention, FlorenceVLVisionChannelAttention],
    }
    supports_gradient_checkpointing = True

    def __init__(self, config: Florence2VisionConfig) -> None:
        super().__init__(config)
        # Stochastic depth grows linearly over the attentions of all blocks, two per block.
        drop_path_rates = iter(torch.linspace(0, config.drop_path_rate, 2 * sum(config.depths), device="cpu").tolist())
        self.convs = nn.ModuleList(
            Florence2VisionConvEmbed(config, stage_idx) for stage_idx in range(len(config.embed_dim))
        )
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                FlorenceVLVisionBlock(config, stage_idx, next(drop_path_rates), next(drop_path_rates))
                for _ in range(depth)
            )
            for stage_idx, depth in enumerate(config.depths)
        )
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    def forward(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | BaseModelOutputWithPooling:
        r"""
        pixel_values (`torch.Tensor` of shape `(num_images, 3, height, width)`):
            Normalized images.
        """
        hidden_states = pixel_values.to(next(self.convs.parameters()).dtype)
        for conv, blocks in zip(self.convs, self.blocks, strict=True):
            hidden_states = conv(hidden_states)  # (num_images, channels, height, width)
            for block in blocks.children():
                hidden_states = block(hidden_states)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states)


class FlorenceVLImageProjection(Florence2MultiModalProjector):
    """Position embeddings, pooling and projection of DaViT's feature map: the last step to V.

    The layers are those of Florence-2; any choice and order of `image_feature_source` is supported.
    """

    def __init__(self, config: Florence2Config, image_feature_source: Sequence[str]) -> None:
        super().__init__(config)
        self.image_feature_source = list(image_feature_source)

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        feature_map = feature_map + self.image_position_embed(feature_map)  # (num_images, channels, height, width)
        positions = feature_map.flatten(2).transpose(1, 2)  # (num_images, num_positions, channels)
        # An image is a video of one frame: it has temporal position 0, and its mean over frames is that frame.
        # The buffer stays in float32 where FSDP computes in bfloat16.
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
    """Token ids of the prompts of the vision tower, padded to one length."""

    def __init__(self, config: FlorenceVLConfig, pad_token_id: int) -> None:
        super().__init__()
        self.names = config.fusion_prompts
        prompts = [config.prompt_token_ids[name] for name in self.names]
        length = max((len(prompt) for prompt in prompts), default=0)
        self.token_ids = [prompt + [pad_token_id] * (length - len(prompt)) for prompt in prompts]
        # Parity: the original attends to the padding within its token ids. Padding that is added here is masked.
        self.masks = [
            [
                int(i < len(prompt) and not (config.mask_prompt_padding and prompt[i] == pad_token_id))
                for i in range(length)
            ]
            for prompt in prompts
        ]
        self.is_masked = not all(all(mask) for mask in self.masks)
        self.input_ids = nn.Buffer(torch.tensor(self.token_ids, dtype=torch.long), persistent=False)
        self.attention_mask = nn.Buffer(torch.tensor(self.masks, dtype=torch.long), persistent=False)

    def reset_buffers(self) -> None:
        """Fill the buffers, which no checkpoint stores, after the model was built on the meta device."""
        init.copy_(self.input_ids, torch.tensor(self.token_ids, dtype=torch.long))
        init.copy_(self.attention_mask, torch.tensor(self.masks, dtype=torch.long))

    def forward(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        # Both (num_prompts, prompt_length). Attention is faster without a mask.
        return self.input_ids, self.attention_mask if self.is_masked else None


class FlorenceVLEncoderAttention(BartAttention):
    """
    BART's attention, which vLLM leaves as it is.

    Tensor parallelism of vLLM 0.32 would split the keys and values of a `BartAttention`, but not its queries.
    """

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return super().forward(hidden_states, *args, **kwargs)


class FlorenceVLVisionTower(Florence2PreTrainedModel):
    """Florence-2 without its decoder: encodes images once, and reads the result under each prompt."""

    _no_split_modules = ["FlorenceVLImageProjection"]
    # Florence-2 ties its decoder, which is never built.
    _tied_weights_keys = {}

    def __init__(self, config: FlorenceVLConfig) -> None:
        super().__init__(config.vision_config)
        davit, bart = config.vision_config.vision_config, config.vision_config.text_config
        self.image_shape = (davit.in_channels, config.image_size, config.image_size)
        self.backbone = FlorenceVLVisionBackbone(davit)
        self.image_projector = FlorenceVLImageProjection(config.vision_config, config.image_feature_source)
        self.prompts = FlorenceVLPrompts(config, bart.pad_token_id)
        self.encoder = BartEncoder(bart)
        for layer in self.encoder.layers:
            layer.self_attn.__class__ = FlorenceVLEncoderAttention
        # FSDP refuses names of layers that do not exist: the decoder is never built.
        self.encoder._no_split_modules = ["BartEncoderLayer"]
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FlorenceVLPrompts):
            module.reset_buffers()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.set_input_embeddings(value)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """
        Compile the blocks of DaViT and BART's encoder, each by itself. Arguments are those of `torch.compile`.

        Blocks of the same shapes share one graph, so that compiling takes much less time than for the whole tower.
        """
        if "recompile_limit" in signature(torch.compile).parameters:  # since PyTorch 2.13
            # All blocks share one limit, 8 by default. There are ten graphs, of four DaViT stages and of the encoder:
            # one for a single image, and one for any other number.
            kwargs.setdefault("recompile_limit", 32)
        for module in self.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.compile(*args, **kwargs)

    @auto_docstring
    def forward(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> FlorenceVLImageFeaturesOutput:
        r"""
        pixel_values (`torch.Tensor` of shape `(num_images, 3, image_size, image_size)`):
            Normalized images.
        """
        # Checked here so that height and width are constants in exported graphs: symbolic ones take minutes to export.
        if tuple(pixel_values.shape[1:]) != self.image_shape:
            raise ValueError(
                f"Got `pixel_values` of shape {tuple(pixel_values.shape)}, expected (num_images, "
                f"{', '.join(map(str, self.image_shape))}); prepare them with `FlorenceVLProcessor`, or change "
                f"`config.image_size`."
            )
        davit = self.backbone(pixel_values, return_dict=True, **kwargs)
        image_feature = self.image_projector(davit.last_hidden_state)  # (num_images, num_feature_tokens, hidden_size)
        features = {IMAGE_FEATURE: image_feature}
        encoder_hidden_states, encoder_attentions = None, None

        num_images, num_feature_tokens, _ = image_feature.shape
        num_prompts = len(self.prompts.names)
        if num_prompts > 0:
            # Every prompt with every image in one batch, the images of one prompt in a row.
            encoded = self.encoder(**self.prompted(image_feature), return_dict=True, **kwargs)
            prompt_features = encoded.last_hidden_state[:, :num_feature_tokens].chunk(num_prompts)
            features |= dict(zip(self.prompts.names, prompt_features, strict=True))
            if encoded.hidden_states is not None:
                encoder_hidden_states = tuple(
                    state.unflatten(0, (num_prompts, num_images)) for state in encoded.hidden_states
                )
            if encoded.attentions is not None:
                encoder_attentions = tuple(
                    weights.unflatten(0, (num_prompts, num_images)) for weights in encoded.attentions
                )
        return FlorenceVLImageFeaturesOutput(
            hidden_states=davit.hidden_states,
            attentions=davit.attentions,
            features=features,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attentions=encoder_attentions,
        )

    def prompted(self, image_feature: torch.Tensor) -> dict[str, torch.Tensor | None]:
        """
        Append each prompt to each image.

        Returns `inputs_embeds` of shape `(num_prompts * num_images, num_feature_tokens + prompt_length, hidden_size)`,
        and the `attention_mask` of their first two dimensions, or `None` where nothing is masked.
        """
        prompt_ids, prompt_mask = self.prompts()
        num_prompts, (num_images, num_feature_tokens, _) = len(prompt_ids), image_feature.shape
        prompt_embeds = self.encoder.embed_tokens(prompt_ids).to(image_feature.device, image_feature.dtype)
        if not self.encoder.embed_tokens.weight.requires_grad:
            # `enable_input_require_grads` makes the output of every embedding table require gradients. Those of a
            # frozen one would keep the activations of the encoder for nothing.
            prompt_embeds = prompt_embeds.detach()
        inputs_embeds = torch.cat(
            [image_feature.repeat(num_prompts, 1, 1), prompt_embeds.repeat_interleave(num_images, dim=0)], dim=1
        )
        attention_mask = None
        if prompt_mask is not None:
            image_mask = prompt_mask.new_ones(num_prompts * num_images, num_feature_tokens)
            attention_mask = torch.cat([image_mask, prompt_mask.repeat_interleave(num_images, dim=0)], dim=1)
        return {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask}


class FlorenceVLFusion(nn.Module):
    """Depth-breadth fusion (DBFusion): combine the features of an image."""

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
    """MLP from the fused features to the hidden size of the language model."""

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
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = [CACHE]

    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True


@auto_docstring(
    custom_intro="""
    The Florence-VL model: a vision tower that reads each image under several prompts, depth-breadth fusion of its
    features, a projector and a language model, without a language modeling head.
    """
)
class FlorenceVLModel(FlorenceVLPreTrainedModel):
    def __init__(self, config: FlorenceVLConfig) -> None:
        super().__init__(config)
        # First, because peft's prompt tuning takes the first table of the size of the vocabulary.
        self.language_model = AutoModel.from_config(config.text_config)
        self.vision_tower = FlorenceVLVisionTower(config)
        self.fusion = FlorenceVLFusion(config)
        self.multi_modal_projector = FlorenceVLMultiModalProjector(config)
        self.post_init()

    @can_return_tuple
    @auto_docstring(custom_intro="Encode images: features of the vision tower, their fusion and projection.")
    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | FlorenceVLImageFeaturesOutput:
        r"""
        pixel_values (`torch.Tensor` of shape `(num_images, 3, image_size, image_size)`):
            Normalized images.
        """
        kwargs.setdefault("output_hidden_states", self.config.output_hidden_states)
        kwargs.setdefault("output_attentions", self.config.output_attentions)
        tower_outputs = self.vision_tower(pixel_values, **kwargs)
        features = {name: tower_outputs.features[name] for name in self.config.fusion_features}
        fused = self.fusion(list(features.values()))  # (num_images, num_image_tokens, fused_hidden_size)
        projected = self.multi_modal_projector(fused)  # (num_images, num_image_tokens, text_hidden_size)
        return FlorenceVLImageFeaturesOutput(
            **{**tower_outputs, "last_hidden_state": fused, "pooler_output": list(projected), "features": features}
        )

    def get_placeholder_mask(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor,
        image_features: torch.Tensor,
    ) -> torch.BoolTensor:
        """
        Find the image tokens, by id or by embedding, and check that their number equals that of the image features.

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
            f"Each image requires {self.config.num_image_tokens} tokens; prepare inputs with `FlorenceVLProcessor`, "
            f"and do not truncate them.",
        )
        return image_mask.unsqueeze(-1).to(inputs_embeds.device)

    @can_return_tuple
    @auto_docstring
    def forward(  # type: ignore[misc]  # upstream's `TransformersKwargs` has `position_ids` too
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, FlorenceVLImageFeaturesOutput] | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | FlorenceVLModelOutputWithPast:
        r"""
        mm_encoder_outputs (`dict[str, FlorenceVLImageFeaturesOutput]`, *optional*):
            Under `"image"`, the output of `get_image_features` for the images of this batch, which are then not
            encoded again. Excludes `pixel_values`.
        cache (`Cache`, *optional*):
            Keys and values of earlier tokens. Also accepted as `past_key_values`, its name before Transformers 5.24.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if pixel_values is not None and mm_encoder_outputs is not None:
            raise ValueError("You cannot specify both pixel_values and mm_encoder_outputs at the same time")

        image_outputs = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None:
            image_outputs = self.get_image_features(pixel_values=pixel_values, return_dict=True)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        image_features = None
        if image_outputs is not None:
            # (num_images * num_image_tokens, text_hidden_size)
            image_features = torch.cat(image_outputs.pooler_output).to(inputs_embeds.device, inputs_embeds.dtype)
            image_mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_features)
            inputs_embeds = inputs_embeds.masked_scatter(image_mask, image_features)

        if cache is not None:
            kwargs[CACHE] = cache
        outputs = self.language_model(
            attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        return FlorenceVLModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
            image_outputs=image_outputs,
            **{CACHE: outputs[CACHE] if CACHE in outputs else None},
        )


@auto_docstring(custom_intro="The Florence-VL model with a language modeling head, which answers about images.")
class FlorenceVLForConditionalGeneration(FlorenceVLPreTrainedModel, FlorenceVLGenerationMixin):
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
            Normalized images.
        """
        return self.model.get_image_features(pixel_values=pixel_values, **kwargs)

    @can_return_tuple
    @auto_docstring
    def forward(  # type: ignore[misc]  # upstream's `TransformersKwargs` has `position_ids` too
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, FlorenceVLImageFeaturesOutput] | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | FlorenceVLCausalLMOutputWithPast:
        r"""
        mm_encoder_outputs (`dict[str, FlorenceVLImageFeaturesOutput]`, *optional*):
            Under `"image"`, the output of `get_image_features` for the images of this batch, which are then not
            encoded again. Excludes `pixel_values`.
        cache (`Cache`, *optional*):
            Keys and values of earlier tokens. Also accepted as `past_key_values`, its name before Transformers 5.24.

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
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            cache=cache,
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
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            image_outputs=outputs.image_outputs,
            **{CACHE: outputs[CACHE] if CACHE in outputs else None},
        )


# `save_pretrained` copies the modules of these classes beside the weights, for `trust_remote_code=True`. Which Auto
# class loads which model is written by `FlorenceVLConfig`.
FlorenceVLModel.register_for_auto_class("AutoModel")
FlorenceVLForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["FlorenceVLForConditionalGeneration", "FlorenceVLModel", "FlorenceVLPreTrainedModel"]
