# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""The model card of a trained model, and the facts about its training that a merged model's card repeats."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import accelerate
import peft
import torch
import transformers
from huggingface_hub import ModelCardData
from peft import PeftModel
from transformers.modelcard import extract_hyperparameters_from_trainer
from transformers.training_args import OptimizerNames

from ..model_cards import is_plain, public_name, write_card
from .arguments import DataArguments, ModelArguments
from .stages import count_trained
from .trainer import FlorenceVLTrainer


# The metadata of a card with the fields of `TrainingFacts`.
TRAINING_METADATA = "florence_vl_training"
# Measurements of an evaluation that are not results.
NOT_A_RESULT = (
    "epoch", "model_preparation_time", "runtime", "samples_per_second", "skipped_samples", "steps_per_second"
)  # fmt: skip


@dataclass(frozen=True)
class TrainingFacts:
    """What a model card says about a training run. Plain values, which metadata in YAML can hold."""

    stage: str
    trained_parameters: dict[str, int]  # by part of the model
    data_name: str
    num_samples: int
    num_skipped: int  # once for each time that a broken sample was skipped
    max_length: int
    num_steps: int
    num_epochs: float
    best_step: int | None  # of the saved weights, if they are not those of the last step
    train_loss: float | None  # the last one in the logs
    hyperparameters: dict[str, str | int | float | bool]
    versions: dict[str, str]  # of packages
    evaluations: dict[str, dict[str, float]]  # by evaluation set

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> "TrainingFacts | None":
        """Return the facts in a card's metadata, or `None` if it has none that are complete."""
        facts = metadata.get(TRAINING_METADATA)
        names = {field.name for field in fields(cls)}
        return cls(**facts) if isinstance(facts, dict) and facts.keys() == names else None


def write_training_card(
    trainer: FlorenceVLTrainer,
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    num_samples: int,
    num_skipped: int,
    evaluations: Mapping[str, Mapping[str, float]],
) -> None:
    """Write the model card of what a trainer saved to its `output_dir`."""
    args, state = trainer.args, trainer.state
    model = trainer.accelerator.unwrap_model(trainer.model)
    is_adapter = isinstance(model, PeftModel)
    trained_parameters = count_trained(model)
    hyperparameters = extract_hyperparameters_from_trainer(trainer)
    hyperparameters["optimizer"] = OptimizerNames(args.optim).value
    for name in ("projector_learning_rate", "vision_tower_learning_rate"):
        hyperparameters[name] = getattr(args, name)
    if is_adapter:
        for name in ("lora_r", "lora_alpha", "lora_dropout"):
            hyperparameters[name] = getattr(model_arguments, name)
        hyperparameters["bits per frozen weight"] = model_arguments.num_bits
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    is_best = args.load_best_model_at_end and state.best_model_checkpoint is not None
    facts = TrainingFacts(
        stage=model_arguments.stage,
        trained_parameters=trained_parameters,
        data_name=public_name(data_arguments.train_file),
        num_samples=num_samples,
        num_skipped=num_skipped,
        max_length=data_arguments.max_length,
        num_steps=state.global_step,
        num_epochs=state.epoch or 0.0,
        best_step=state.best_global_step if is_best else None,
        train_loss=losses[-1] if losses else None,
        hyperparameters={
            name: value if type(value) in (bool, int, float) else str(value)
            for name, value in hyperparameters.items()
            if value is not None
        },
        versions={module.__name__: str(module.__version__) for module in (transformers, torch, accelerate, peft)},
        evaluations={
            of_set: {name: value for name, value in measured.items() if name not in NOT_A_RESULT}
            for of_set, measured in evaluations.items()
        },
    )
    processor = trainer.data_collator.processor
    output = Path(str(args.output_dir))
    metadata: dict[str, Any] = {TRAINING_METADATA: asdict(facts)}
    base, data = model_arguments.model_name_or_path, data_arguments.train_file
    write_card(
        output,
        "trained.md.jinja",
        ModelCardData(
            pipeline_tag="image-text-to-text",
            library_name="peft" if is_adapter else "transformers",
            tags=["florence-vl", "florence2", *(["lora"] if is_adapter else [])],
            # Ids on the Hub, and no paths of this machine.
            base_model=None if Path(base).exists() else base,
            datasets=None if Path(data).exists() else [data],
            **metadata,
        ),
        name=args.hub_model_id or output.name,
        base_name=public_name(base),
        is_adapter=is_adapter,
        is_plain=is_plain(processor),
        image_token=processor.image_token,
        do_pad=getattr(processor.image_processor, "do_pad", False),
        # Without LoRA and the trained copy of the projector.
        num_parameters=model.get_base_model().num_parameters() - sum(trained_parameters.values())
        if is_adapter
        else model.num_parameters(),
        config=model.config,
        training=facts,
    )
