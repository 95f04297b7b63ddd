# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Training stages: which parts of the model are trained."""

from torch import nn
from transformers.utils import logging

from ..modeling import FlorenceVLForConditionalGeneration, FlorenceVLModel
from .training_hook import inner_model, register_training_hook, set_frozen_parts_to_eval


logger = logging.get_logger(__name__)

# The parts of the model, and their modules.
PARTS = {
    "vision_tower": ("vision_tower",),
    "projector": ("multi_modal_projector",),
    "language_model": ("language_model", "lm_head"),
}

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
    raise ValueError(f"{parameter_name!r} is not a parameter of a Florence-VL model.")


def set_trainable(model: FlorenceVLForConditionalGeneration | FlorenceVLModel, stage: str) -> dict[str, int]:
    """
    Train the parts of a stage, freeze all others, and log both. Registers the training hook, for any trainer.

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
    register_training_hook(model)
    set_frozen_parts_to_eval(inner_model(model))
    log_trained(model, f"Stage {stage}")
    return count_trained(model)


def count_trained(model: nn.Module) -> dict[str, int]:
    """Count the trained parameters of each part that has any."""
    trained: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            trained[part_of(name)] = trained.get(part_of(name), 0) + parameter.numel()
    return trained


def log_trained(model: nn.Module, name: str) -> None:
    """Log which parts of a model are trained and which are frozen, under a name."""
    trained = count_trained(model)
    parts = [f"{part} {f'trained, {trained[part]:,} parameters' if part in trained else 'frozen'}" for part in PARTS]
    logger.info(f"{name}: {'; '.join(parts)}.")
