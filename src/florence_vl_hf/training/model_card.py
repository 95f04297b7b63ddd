# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""The model card of a trained model: what was trained, on what, how, and what came out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import accelerate
import peft
import torch
import transformers
from peft import PeftModel
from transformers.modelcard import extract_hyperparameters_from_trainer

from ..model_cards import TrainedCard, Training, hub_id, public_name, write_card
from .arguments import DataArguments, ModelArguments
from .stages import count_trained
from .trainer import FlorenceVLTrainer


# Of an evaluation's measurements, those that say how long it took and when it was.
NOT_A_RESULT = (
    "epoch",
    "model_preparation_time",
    "runtime",
    "samples_per_second",
    "skipped_samples",
    "steps_per_second",
)
# Settings beside `Trainer`'s own that a card tells, where they are given.
OWN_SETTINGS = ("projector_learning_rate", "vision_tower_learning_rate")
LORA_SETTINGS = ("lora_r", "lora_alpha", "lora_dropout")


def write_training_card(
    trainer: FlorenceVLTrainer,
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    num_skipped: int,
    evaluations: Mapping[str, Mapping[str, float]],
) -> None:
    """
    Write the `README.md` of what a trainer saved into its `output_dir`.

    Args:
        trainer (`FlorenceVLTrainer`): After its training.
        model_arguments (`ModelArguments`): Of the recipe.
        data_arguments (`DataArguments`): Of the recipe.
        num_skipped (`int`): How often a broken sample was left out, by all processes.
        evaluations (`Mapping`): By the name of the evaluation set, what was measured on it at the end.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    is_best = trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None
    lora = {name: p.numel() for name, p in model.named_parameters() if "lora_" in name}
    copies = sum(p.numel() for name, p in model.named_parameters() if "modules_to_save" in name)
    trained = count_trained(model)
    if lora:
        trained["language_model"] -= sum(lora.values())
    training = Training(
        stage=model_arguments.stage,
        trained_parameters={part: number for part, number in trained.items() if number},
        lora_parameters=sum(lora.values()),
        dataset=public_name(data_arguments.train_file),
        num_samples=len(trainer.train_dataset),
        num_skipped=num_skipped,
        num_steps=trainer.state.global_step,
        num_epochs=trainer.state.epoch or 0,
        best_step=trainer.state.best_global_step if is_best else None,
        last_loss=losses[-1] if losses else None,
        max_length=data_arguments.max_length,
        settings=_hyperparameters(trainer, model_arguments),
        versions={module.__name__: module.__version__ for module in (transformers, torch, accelerate, peft)},
        evaluations={
            name: {key: value for key, value in measured.items() if key not in NOT_A_RESULT}
            for name, measured in evaluations.items()
        },
    )
    dataset = hub_id(data_arguments.train_file)
    card = TrainedCard(
        name=trainer.args.hub_model_id or Path(trainer.args.output_dir).name,
        config=model.config,
        processor=trainer.data_collator.processor,
        base=model_arguments.model_name_or_path,
        training=training,
        num_parameters=sum(p.numel() for p in model.parameters()) - sum(lora.values()) - copies,
        is_adapter=isinstance(model, PeftModel),
        datasets=[dataset] if dataset else [],
    )
    write_card(Path(trainer.args.output_dir), card)


def _hyperparameters(trainer: FlorenceVLTrainer, model_arguments: ModelArguments) -> dict[str, Any]:
    settings = {name: getattr(trainer.args, name) for name in OWN_SETTINGS}
    if model_arguments.use_peft:
        settings |= {name: getattr(model_arguments, name) for name in LORA_SETTINGS}
        settings["bits per frozen weight"] = model_arguments.num_bits
    given = {name: value for name, value in settings.items() if value is not None}
    args = trainer.args
    optimizer = args.optim.value
    if "adam" in optimizer:
        optimizer += f", betas ({args.adam_beta1}, {args.adam_beta2}), epsilon {args.adam_epsilon}"
    if args.optim_args:
        optimizer += f", {args.optim_args}"
    return extract_hyperparameters_from_trainer(trainer) | {"optimizer": optimizer} | given


__all__ = ["write_training_card"]
