# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""The stages of training: which parts of the model learn, and how fast."""

from torch import nn
from transformers.utils import logging

from ..modeling import FlorenceVLForConditionalGeneration, FlorenceVLModel


logger = logging.get_logger(__name__)

# The parts of the model, and the modules that make them up.
PARTS = {
    "vision_tower": ("vision_tower",),
    "projector": ("multi_modal_projector",),
    "language_model": ("language_model", "lm_head"),
}

# What each stage trains. The first two are the paper's.
STAGES = {
    "pretrain": ("vision_tower", "projector", "language_model"),
    "finetune": ("projector", "language_model"),
    "projector": ("projector",),
    "language_model": ("language_model",),
    "vision": ("vision_tower", "projector"),
}


def part_of(parameter_name: str) -> str:
    """The part of the model, one of `PARTS`, that a parameter belongs to by its name, with any wrapper's prefix."""
    modules = parameter_name.split(".")
    for part, names in PARTS.items():
        if not set(names).isdisjoint(modules):
            return part
    raise ValueError(f"{parameter_name!r} is no parameter of a Florence-VL model.")


def set_trainable(model: FlorenceVLForConditionalGeneration | FlorenceVLModel, stage: str) -> dict[str, int]:
    """
    Let the parts that a stage trains learn, freeze all others, and log both.

    Args:
        model (`FlorenceVLForConditionalGeneration` or `FlorenceVLModel`): Before any adapter is put onto it.
        stage (`str`): One of `STAGES`: `pretrain` trains everything, `finetune` projector and language model,
            `projector` that alone, `language_model` that alone, `vision` tower and projector.

    Returns:
        `dict[str, int]`: Number of parameters that are trained, by part.

    Raises:
        ValueError: If there is no such stage.
    """
    if stage not in STAGES:
        raise ValueError(f"Got stage {stage!r}, expected one of {', '.join(map(repr, STAGES))}.")
    unread = _unread_parameters(model)
    for name, parameter in model.named_parameters():
        # Weights in 4 or 8 bits are whole numbers, which have no gradient.
        is_trained = part_of(name) in STAGES[stage] and name not in unread and parameter.is_floating_point()
        parameter.requires_grad_(is_trained)
    # Frozen parts go to evaluation mode: see `FlorenceVLModel.train`.
    model.train(model.training)
    log_trained(model, f"Stage {stage}")
    return count_trained(model)


def count_trained(model: nn.Module) -> dict[str, int]:
    """Number of parameters that are trained, by part; parts that are frozen as a whole are left out."""
    trained: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            trained[part_of(name)] = trained.get(part_of(name), 0) + parameter.numel()
    return trained


def log_trained(model: nn.Module, name: str) -> None:
    """Log under a name which parts of a model are trained, and which are frozen."""
    trained = count_trained(model)
    parts = [f"{part} {f'trained, {trained[part]:,} parameters' if part in trained else 'frozen'}" for part in PARTS]
    logger.info(f"{name}: {'; '.join(parts)}.")


def _unread_parameters(model: nn.Module) -> set[str]:
    """Parameters that no forward pass reads: without prompts, the encoder is loaded but not used."""
    if model.config.fusion_prompts:
        return set()
    return {name for name, _ in model.named_parameters() if "vision_tower.encoder." in name}


def parameter_groups(
    model: nn.Module,
    decay_parameters: set[str],
    weight_decay: float,
    learning_rates: dict[str, float | None],
) -> list[dict]:
    """
    The trained parameters as an optimizer takes them: by part, each with and without weight decay.

    Args:
        model (`nn.Module`): The model, which may be wrapped.
        decay_parameters (`set[str]`): Names of the parameters that weight decay applies to.
        weight_decay (`float`): For those.
        learning_rates (`dict[str, float | None]`): By part; without, a part has the optimizer's own.
    """
    groups: dict[tuple[str, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part, decays = part_of(name), name in decay_parameters
        if (part, decays) not in groups:
            settings = {"params": [], "weight_decay": weight_decay if decays else 0.0}
            if learning_rates.get(part) is not None:
                settings["lr"] = learning_rates[part]
            groups[part, decays] = settings
        groups[part, decays]["params"].append(parameter)
    return list(groups.values())


__all__ = ["PARTS", "STAGES", "count_trained", "log_trained", "parameter_groups", "part_of", "set_trainable"]
