# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""What training adds to the forward pass: evaluation mode of frozen parts, and batches without images."""

from typing import Any

import torch
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_layers import GradientCheckpointingLayer

from ..modeling import FlorenceVLModel
from ..modeling.transformers_compat import CACHE


def register_training_hook(model: nn.Module) -> None:
    """
    Prepare the forward pass of a model for training. `set_trainable` and `FlorenceVLTrainer` call it. With another
    trainer, call it yourself for a model with adapters, and with ZeRO-3 after DeepSpeed has wrapped the model.

    1. In training mode, frozen parts stay in evaluation mode: `Trainer` calls `model.train()` before each step.
    2. A batch without images also encodes one black image, whose features are added with weight zero: in training, so
       that the same parameters have gradients (of zero) in every process; and wherever weights are sharded, so that
       every process gathers the same weights. Otherwise processes with and without images wait for each other forever.

    Args:
        model (`nn.Module`): A Florence-VL model, with or without adapters, wrapped or not.
    """
    model = inner_model(model)
    hooks = model._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is _before_forward]:
        # To the end: DeepSpeed records the order of modules in hooks, which must run before this one encodes an image.
        hooks[key] = hooks.pop(key)
        return
    model.register_forward_pre_hook(_before_forward, with_kwargs=True)


def inner_model(model: nn.Module) -> FlorenceVLModel:
    """Return the `FlorenceVLModel` inside a model with a head, with adapters, or in another wrapper."""
    for module in model.modules():
        if isinstance(module, FlorenceVLModel):
            return module
    raise ValueError(f"Got a {type(model).__name__}, expected a Florence-VL model.")


def is_trained(module: nn.Module) -> bool:
    """Whether any parameter of a module is trained."""
    return any(parameter.requires_grad for parameter in module.parameters())


def set_frozen_parts_to_eval(model: FlorenceVLModel) -> None:
    """Put parts without trained parameters into evaluation mode, so that they have no dropout or stochastic depth."""
    for part in (model.vision_tower, model.multi_modal_projector, model.language_model):
        if not is_trained(part):
            part.eval()
    # Gradients of the projector pass through a frozen language model, and only layers in training mode are
    # checkpointed. The modules of these layers, such as dropout, keep their mode.
    for layer in model.language_model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = model.training


def _before_forward(
    model: FlorenceVLModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if model.training:
        set_frozen_parts_to_eval(model)
    if (
        kwargs.get("pixel_values") is not None
        or kwargs.get("mm_encoder_outputs")
        or not _needs_black_image(model, kwargs)
    ):
        return None
    # The vision tower before the embeddings, as in batches with images: all processes gather weights in one order.
    # Not the tower's `dtype`: layers that FSDP shards are stored in float32 and compute in another dtype.
    weight = next(model.vision_tower.backbone.convs.parameters())
    pixel_values = torch.zeros((1, *model.vision_tower.image_shape), dtype=weight.dtype, device=weight.device)
    feature = model.get_image_features(pixel_values, return_dict=True).pooler_output[0][:1]  # (1, text_hidden_size)
    inputs_embeds = kwargs.get("inputs_embeds")
    if inputs_embeds is None:
        inputs_embeds = model.get_input_embeddings()(kwargs["input_ids"])
    inputs_embeds = inputs_embeds + 0 * feature.to(inputs_embeds.device, inputs_embeds.dtype)
    return args, {**kwargs, "input_ids": None, "inputs_embeds": inputs_embeds}


def _needs_black_image(model: FlorenceVLModel, kwargs: dict[str, Any]) -> bool:
    cache = kwargs.get(CACHE)
    if cache is not None and cache.get_seq_length() > 0:
        return False  # a decoding step, which has no images in any process
    has_gradients = model.training and (is_trained(model.vision_tower) or is_trained(model.multi_modal_projector))
    return has_gradients or _is_sharded(model)


def _is_sharded(model: nn.Module) -> bool:
    """Whether processes gather each other's weights, layer by layer."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    # Not Transformers' `is_fsdp_enabled`, which is about FSDP1 with `cpu_ram_efficient_loading`.
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    is_fsdp = any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules())
    return torch.distributed.get_world_size() > 1 and (is_fsdp or is_deepspeed_zero3_enabled())
