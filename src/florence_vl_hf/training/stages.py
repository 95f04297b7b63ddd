# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Training stages: which parts of the model are trained, and what that changes in its forward pass."""

from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from ..modeling import FlorenceVLForConditionalGeneration, FlorenceVLModel
from ..modeling.transformers_compat import CACHE


logger = logging.get_logger(__name__)

# The parts of the model, and their modules.
PARTS = {
    "vision_tower": ("vision_tower",),
    "projector": ("multi_modal_projector",),
    "language_model": ("language_model", "lm_head"),
}

Stage = Literal["pretrain", "finetune", "projector", "language_model", "vision"]
# The parts that each stage trains. The first two stages are the paper's.
STAGES = {
    "pretrain": ("vision_tower", "projector", "language_model"),
    "finetune": ("projector", "language_model"),
    "projector": ("projector",),
    "language_model": ("language_model",),
    "vision": ("vision_tower", "projector"),
}


def part_of(parameter_name: str) -> str:
    """Return the part of the model, one of `PARTS`, of a parameter, whose name may have a wrapper's prefix."""
    modules = parameter_name.split(".")
    for part, names in PARTS.items():
        if not set(names).isdisjoint(modules):
            return part
    raise ValueError(f"{parameter_name!r} belongs to none of {', '.join(PARTS)}; add its module to `PARTS`.")


def set_trainable(model: FlorenceVLForConditionalGeneration | FlorenceVLModel, stage: str) -> dict[str, int]:
    """
    Train the parts of a stage, freeze all others, log both, and call `register_training_hook`.

    Args:
        model (`FlorenceVLForConditionalGeneration` or `FlorenceVLModel`): A model without adapters.
        stage (`str`): One of `STAGES`: `pretrain` trains everything, `finetune` projector and language model,
            `projector` and `language_model` that part alone, `vision` vision tower and projector.

    Returns:
        `dict[str, int]`: Number of trained parameters of each part.

    Raises:
        ValueError: If there is no such stage.
    """
    if stage not in STAGES:
        raise ValueError(f"Got stage {stage!r}, expected one of {', '.join(map(repr, STAGES))}.")
    for name, parameter in model.named_parameters():
        # Without prompts, the encoder of the vision tower is not used. Quantized weights are integers.
        is_used = bool(model.config.fusion_prompts) or "vision_tower.encoder." not in name
        parameter.requires_grad_(part_of(name) in STAGES[stage] and is_used and parameter.is_floating_point())
    model.train(model.training)
    _set_frozen_parts_to_eval(register_training_hook(model))
    return log_trained(model, f"Stage {stage}")


def count_trained(model: nn.Module) -> dict[str, int]:
    """Count the trained parameters of each part that has any."""
    trained: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            trained[part_of(name)] = trained.get(part_of(name), 0) + parameter.numel()
    return trained


def log_trained(model: nn.Module, name: str) -> dict[str, int]:
    """Log which parts of a model are trained, under a name, and return the number of trained parameters of each."""
    trained = count_trained(model)
    parts = [f"{part} {f'trained, {trained[part]:,} parameters' if part in trained else 'frozen'}" for part in PARTS]
    logger.info(f"{name}: {'; '.join(parts)}.")
    return trained


def register_training_hook(model: nn.Module) -> FlorenceVLModel:
    """
    Prepare the forward pass of a model for training.

    `set_trainable` and `FlorenceVLTrainer` call this. With another trainer, call it for a model with adapters, and
    with ZeRO-3 once more after DeepSpeed has wrapped the model.

    1. In training mode, frozen parts stay in evaluation mode: `Trainer` calls `model.train()` before each step.
    2. A batch without images also encodes one black image, whose features are added with weight zero: in training, so
       that the same parameters have gradients (of zero) in every process; and wherever weights are sharded, so that
       every process gathers the same weights. Otherwise processes with and without images wait for each other forever.

    Args:
        model (`nn.Module`): A Florence-VL model, with or without adapters, wrapped or not.

    Returns:
        `FlorenceVLModel`: The module with the hook.
    """
    inner = next((module for module in model.modules() if isinstance(module, FlorenceVLModel)), None)
    if inner is None:
        raise ValueError(
            f"Got a {type(model).__name__}, expected a Florence-VL of this package; import florence_vl_hf before the "
            f"model is loaded."
        )
    # Once, and last: DeepSpeed records the order of modules in hooks, which must run before this one encodes an image.
    if next(reversed(inner._forward_pre_hooks.values()), None) is _before_forward:
        return inner
    for key in [key for key, hook in inner._forward_pre_hooks.items() if hook is _before_forward]:
        del inner._forward_pre_hooks[key], inner._forward_pre_hooks_with_kwargs[key]
    inner.register_forward_pre_hook(_before_forward, with_kwargs=True)
    return inner


def _before_forward(
    model: FlorenceVLModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if model.training:
        _set_frozen_parts_to_eval(model)
    has_images = kwargs.get("pixel_values") is not None or kwargs.get("mm_encoder_outputs")
    # A decoding step has no images in any process.
    is_decoding = kwargs.get(CACHE) is not None and kwargs[CACHE].get_seq_length() > 0
    if has_images or is_decoding:
        return None
    has_gradients = model.training and (_is_trained(model.vision_tower) or _is_trained(model.multi_modal_projector))
    if not (has_gradients or _is_sharded(model)):
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


def _is_sharded(model: FlorenceVLModel) -> bool:
    # Not Transformers' `is_fsdp_enabled`, which is about FSDP1 with `cpu_ram_efficient_loading`.
    is_fsdp = any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules())
    return is_fsdp or is_deepspeed_zero3_enabled()


def _set_frozen_parts_to_eval(model: FlorenceVLModel) -> None:
    """Put parts without trained parameters into evaluation mode, so that they have no dropout or stochastic depth."""
    for part in (model.vision_tower, model.multi_modal_projector, model.language_model):
        if not _is_trained(part):
            part.eval()
    # Gradients of the projector pass through a frozen language model, and only layers in training mode are
    # checkpointed. The modules of these layers, such as dropout, keep their mode.
    for layer in model.language_model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = model.training


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
