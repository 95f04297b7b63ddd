# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""The model card of a trained model: what was trained, on what, how, and what came out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import accelerate
import peft
import torch
import transformers
from huggingface_hub import ModelCardData
from peft import PeftModel
from transformers.modelcard import extract_hyperparameters_from_trainer

from ..model_cards import is_plain, public_name, write_card
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
    is_adapter = isinstance(model, PeftModel)
    processor = trainer.data_collator.processor
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    base_name = public_name(model_arguments.model_name_or_path)
    results = {
        name: {key: value for key, value in measured.items() if key not in NOT_A_RESULT}
        for name, measured in evaluations.items()
    }
    write_card(
        Path(trainer.args.output_dir),
        "trained.md.jinja",
        _metadata(model_arguments, data_arguments, is_adapter),
        name=trainer.args.hub_model_id or Path(trainer.args.output_dir).name,
        base_name=base_name,
        is_adapter=is_adapter,
        is_plain=is_plain(processor),
        image_token=processor.image_token,
        do_pad=getattr(processor.image_processor, "do_pad", False),
        stage=model_arguments.stage,
        trained=count_trained(model),
        num_parameters=model.num_parameters() if not is_adapter else model.get_base_model().num_parameters(),
        config=model.config,
        data_name=public_name(data_arguments.train_file),
        num_samples=len(trainer.train_dataset),
        num_skipped=num_skipped,
        max_length=data_arguments.max_length,
        state=trainer.state,
        is_best=trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None,
        train_loss=losses[-1] if losses else None,
        hyperparameters=_hyperparameters(trainer, model_arguments),
        versions={module.__name__: module.__version__ for module in (transformers, torch, accelerate, peft)},
        evaluations=results,
        measures=sorted({measure for measured in results.values() for measure in measured}),
    )


def _hyperparameters(trainer: FlorenceVLTrainer, model_arguments: ModelArguments) -> dict[str, Any]:
    settings = {name: getattr(trainer.args, name) for name in OWN_SETTINGS}
    if model_arguments.use_peft:
        settings |= {name: getattr(model_arguments, name) for name in LORA_SETTINGS}
        settings["bits per frozen weight"] = model_arguments.num_bits
    given = {name: value for name, value in settings.items() if value is not None}
    return extract_hyperparameters_from_trainer(trainer) | given


def _metadata(model_arguments: ModelArguments, data_arguments: DataArguments, is_adapter: bool) -> ModelCardData:
    known = {}
    # The Hub knows ids; folders of this machine concern nobody.
    if not Path(model_arguments.model_name_or_path).exists():
        known["base_model"] = model_arguments.model_name_or_path
    if not Path(data_arguments.train_file).exists():
        known["datasets"] = [data_arguments.train_file]
    return ModelCardData(
        pipeline_tag="image-text-to-text",
        library_name="peft" if is_adapter else "transformers",
        tags=["florence-vl", "florence2", *(["lora"] if is_adapter else [])],
        **known,
    )


__all__ = ["write_training_card"]
