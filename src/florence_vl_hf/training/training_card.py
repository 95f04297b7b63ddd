# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""The facts of a training run for its model card."""

from collections.abc import Mapping
from pathlib import Path

import accelerate
import peft
import torch
import transformers
from peft import PeftModel
from transformers.modelcard import extract_hyperparameters_from_trainer
from transformers.training_args import OptimizerNames

from ..model_cards import TrainedCard, Training, hub_id, public_name, write_card
from .arguments import DataArguments, ModelArguments
from .stages import count_trained
from .trainer import FlorenceVLTrainer


# Measurements of an evaluation that are not results.
NOT_A_RESULT = {"epoch", "model_preparation_time", "runtime", "skipped_samples"} | {
    f"{unit}_per_second" for unit in ("samples", "steps")
}


def write_training_card(
    trainer: FlorenceVLTrainer,
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    num_samples: int,
    num_skipped: int,
    evaluations: Mapping[str, Mapping[str, float]],
) -> None:
    """Write the model card of a trained model, or adapter, to the `output_dir` of its trainer."""
    args, state, output_dir = trainer.args, trainer.state, Path(str(trainer.args.output_dir))
    model = trainer.accelerator.unwrap_model(trainer.model)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    lora_parameters = sum(size for name, size in sizes.items() if "lora_" in name)
    copied_parameters = sum(size for name, size in sizes.items() if "modules_to_save" in name)
    trained = count_trained(model)
    if lora_parameters:
        trained["language_model"] -= lora_parameters

    settings = extract_hyperparameters_from_trainer(trainer)
    settings["optimizer"] = OptimizerNames(args.optim).value
    if "adam" in settings["optimizer"]:
        settings["optimizer"] += f", betas ({args.adam_beta1}, {args.adam_beta2}), epsilon {args.adam_epsilon}"
    settings |= {name: getattr(args, name) for name in ("projector_learning_rate", "vision_tower_learning_rate")}
    if model_arguments.use_peft:
        settings |= {name: getattr(model_arguments, name) for name in ("lora_r", "lora_alpha", "lora_dropout")}
        settings["bits per frozen weight"] = model_arguments.num_bits
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    training = Training(
        stage=model_arguments.stage,
        trained_parameters={part: number for part, number in trained.items() if number},
        lora_parameters=lora_parameters,
        dataset=public_name(data_arguments.train_file),
        num_samples=num_samples,
        num_skipped=num_skipped,
        num_steps=state.global_step,
        num_epochs=state.epoch or 0,
        best_step=state.best_global_step if args.load_best_model_at_end and state.best_model_checkpoint else None,
        last_loss=losses[-1] if losses else None,
        max_length=data_arguments.max_length,
        settings={name: value for name, value in settings.items() if value is not None},
        versions={module.__name__: str(module.__version__) for module in (transformers, torch, accelerate, peft)},
        evaluations={
            of_set: {name: value for name, value in measured.items() if name not in NOT_A_RESULT}
            for of_set, measured in evaluations.items()
        },
    )
    dataset = hub_id(data_arguments.train_file)
    card = TrainedCard(
        name=args.hub_model_id or output_dir.name,
        config=model.config,
        processor=trainer.data_collator.processor,
        base=model_arguments.model_name_or_path,
        training=training,
        num_parameters=sum(sizes.values()) - lora_parameters - copied_parameters,
        is_adapter=isinstance(model, PeftModel),
        datasets=[dataset] if dataset else [],
    )
    write_card(output_dir, card)
