# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""A training run, from a recipe to a directory that loads through the Auto classes."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import accelerate
import peft
import torch
import transformers
from datasets import Dataset
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import set_seed
from transformers.modelcard import extract_hyperparameters_from_trainer
from transformers.training_args import OptimizerNames
from transformers.utils import logging

from ..conversion import check_model_type, load_pretrained
from ..conversion.checkpoint_files import locked
from ..model_cards import TrainedCard, Training, hub_id, public_name, write_card
from ..modeling import FlorenceVLForConditionalGeneration
from ..processing import FlorenceVLProcessor
from ..quantization import quantization_config
from .adapters import lora_config
from .arguments import DataArguments, FlorenceVLTrainingArguments, ModelArguments, parse_recipe
from .checkpoints import last_complete_checkpoint
from .collator import FlorenceVLCollator
from .data_loading import load_conversations
from .samples import SampleError
from .stages import STAGES, count_trained, log_trained, set_trainable
from .trainer import AnswerMetric, FlorenceVLTrainer, TrainingError, exact_match


logger = logging.get_logger(__name__)

# Measurements of an evaluation that are not results.
NOT_RESULTS = ("model_preparation_time", "runtime", "samples_per_second", "steps_per_second")


def train(recipe: dict[str, Any]) -> dict[str, float]:
    """
    Train a model, and save it with its processor and its model card to `output_dir`.

    Resumes from the last complete checkpoint in `output_dir`, if there is one.

    Args:
        recipe (`dict[str, Any]`): Settings of `ModelArguments`, `DataArguments` and `FlorenceVLTrainingArguments`, as
            returned by `read_recipe`.

    Returns:
        `dict[str, float]`: Metrics of the training and of each evaluation set at its end.

    Raises:
        ValueError: If a setting is wrong, or settings do not fit together.
        SampleError: If a sample is broken, and `on_error` is `raise`.
        TrainingError: If nothing is learned. No model is saved then.
        CheckpointError: If another run is writing to `output_dir`.
    """
    arguments = parse_recipe(recipe)
    args = arguments[-1]
    with locked(Path(str(args.output_dir))) if args.process_index == 0 else nullcontext():
        return _train(*arguments)


def _train(
    model_arguments: ModelArguments, data_arguments: DataArguments, args: FlorenceVLTrainingArguments
) -> dict[str, float]:
    answer_metric = load_answer_metric(args.answer_metric)
    check_model_type(model_arguments.model_name_or_path)
    if args.eval_strategy != "no" and not data_arguments.eval_files:
        raise ValueError("Got an `eval_strategy` but no `eval_file`; add one.")
    refuse_to_overwrite(Path(str(args.output_dir)), model_arguments.model_name_or_path, *data_arguments.paths)
    set_seed(args.seed)
    with args.main_process_first(desc="reading the data"):
        train_dataset, eval_datasets = load_datasets(data_arguments)
    model, processor = load_model(model_arguments, data_arguments)
    trainer = FlorenceVLTrainer(
        model=model,
        args=args,
        data_collator=FlorenceVLCollator(
            processor, data_arguments.max_length, data_arguments.on_error, data_arguments.max_image_side
        ),
        answer_metric=answer_metric,
        train_dataset=train_dataset,
        eval_dataset=eval_datasets.get(None, eval_datasets or None),
    )
    metrics = train_or_resume(trainer)
    evaluations = {}
    for name, dataset in eval_datasets.items():
        prefix = "eval" if name is None else f"eval_{name}"
        measured = _last_evaluation(trainer, prefix) or trainer.evaluate(dataset, metric_key_prefix=prefix)
        results = {key.removeprefix(f"{prefix}_"): value for key, value in measured.items() if key.startswith(prefix)}
        metrics.update(measured)
        if results := {key: results[key] for key in results if key not in NOT_RESULTS}:
            evaluations[name or "evaluation"] = results

    trainer.save_model()
    trainer.save_state()
    trainer.log_metrics("all", metrics)
    trainer.save_metrics("all", metrics)
    counts = {"num_samples": len(train_dataset), "num_skipped": trainer.total_skipped()}
    trainer.write_card = partial(
        write_training_card, trainer, model_arguments, data_arguments, **counts, evaluations=evaluations
    )
    trainer.create_model_card()
    logger.info(f"Saved the model, its processor and its model card to {args.output_dir}.")
    if args.push_to_hub:
        trainer.push_to_hub()
    return metrics


def refuse_to_overwrite(output_dir: Path, *inputs: str) -> None:
    """Raise a `ValueError` if a local model, or data, is in the output directory, however its path is written."""
    for path in map(Path, inputs if output_dir.exists() else ()):
        if path.exists() and any(
            directory.samefile(output_dir) for directory in (path, *path.absolute().parents, *path.resolve().parents)
        ):
            raise ValueError(f"{path} is in `output_dir: {output_dir}`, which a run writes to; choose another one.")


def load_answer_metric(name: str) -> AnswerMetric:
    """Import the metric of generated answers that a recipe names."""
    if name == "exact_match":
        return exact_match
    try:
        return resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"Got `answer_metric: {name}`, expected exact_match or package.module:function on PYTHONPATH ({error})."
        ) from error


def load_datasets(data_arguments: DataArguments) -> tuple[Dataset, dict[str | None, Dataset]]:
    """Return the training set, and the evaluation sets by name."""
    image_folder = data_arguments.image_folder
    eval_image_folder = data_arguments.eval_image_folder or image_folder
    for directory in filter(None, (image_folder, eval_image_folder)):
        if not Path(directory).is_dir():
            raise ValueError(f"There is no image directory {directory}; give the one that paths are relative to.")
    eval_datasets = {
        name: load_conversations(file, eval_image_folder, data_arguments.eval_split)
        for name, file in data_arguments.eval_files.items()
    }
    return load_conversations(data_arguments.train_file, image_folder, data_arguments.train_split), eval_datasets


def load_model(
    model_arguments: ModelArguments, data_arguments: DataArguments
) -> tuple[FlorenceVLForConditionalGeneration | PeftModel, FlorenceVLProcessor]:
    """Load the model, whose stage's parts are trained, with LoRA if requested, and its processor."""
    dtype, num_bits = getattr(torch, model_arguments.dtype), model_arguments.num_bits
    (model, loading), processor = load_pretrained(
        model_arguments.model_name_or_path,
        chat_template=data_arguments.chat_template,
        dtype=dtype,
        attn_implementation=model_arguments.attn_implementation,
        quantization_config=None if num_bits is None else quantization_config(num_bits, dtype),
        # A fused feature of another width requires another first layer of the projector.
        ignore_mismatched_sizes=bool(model_arguments.fusion_changes),
        output_loading_info=True,
        **model_arguments.fusion_changes,
    )
    trains_projector = "projector" in STAGES[model_arguments.stage]
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(f"{model_arguments.model_name_or_path} lacks {missing[0]}; give a complete model.")
    if loading["mismatched_keys"]:
        is_new = "The first layer of the projector is new, since the fused feature has another width"
        if not trains_projector:
            raise ValueError(f"{is_new}, but stage {model_arguments.stage!r} does not train it; choose `projector`.")
        logger.warning(f"{is_new}.")
    if data_arguments.do_pad is not None:
        processor.image_processor.do_pad = data_arguments.do_pad
    if num_bits is not None:
        # `Trainer` enables checkpointing.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if model_arguments.use_peft:
        lora = (model_arguments.lora_r, model_arguments.lora_alpha, model_arguments.lora_dropout)
        model = get_peft_model(model, lora_config(model, *lora, train_projector=trains_projector))
        log_trained(model, f"Stage {model_arguments.stage} with LoRA")
    else:
        set_trainable(model, model_arguments.stage)
    return model, processor


def train_or_resume(trainer: FlorenceVLTrainer) -> dict[str, float]:
    """Train, from a checkpoint if there is one, and return the metrics."""
    args = trainer.args
    checkpoint = args.resume_from_checkpoint or last_complete_checkpoint(str(args.output_dir))
    if checkpoint is None:
        return trainer.train().metrics
    if not (args.auto_resume or args.resume_from_checkpoint):
        raise ValueError(f"There is {checkpoint} of another run; choose another `output_dir`, or set `auto_resume`.")
    logger.info(f"Resuming from {checkpoint}.")
    try:
        return trainer.train(resume_from_checkpoint=str(checkpoint)).metrics
    except (KeyError, RuntimeError, ValueError) as error:
        step = str(checkpoint).rpartition("-")[2]
        is_of_run = isinstance(error, SampleError | TrainingError)
        if is_of_run or not step.isdecimal() or trainer.state.global_step > int(step):
            raise
        raise ValueError(
            f"The run cannot resume from {checkpoint}: {error}. If the recipe changed, choose another `output_dir`."
        ) from error


def _last_evaluation(trainer: FlorenceVLTrainer, prefix: str) -> dict[str, float] | None:
    """Return the metrics of the current weights, if the last step was followed by an evaluation."""
    if trainer.args.load_best_model_at_end:
        return None
    of_last_step = (entry for entry in trainer.state.log_history if entry["step"] == trainer.state.global_step)
    return next((entry for entry in of_last_step if f"{prefix}_loss" in entry), None)


def write_training_card(
    trainer: FlorenceVLTrainer,
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    num_samples: int,
    num_skipped: int,
    evaluations: dict[str, dict[str, float]],
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
        evaluations=evaluations,
    )
    dataset = hub_id(data_arguments.train_file)
    card = TrainedCard(
        name=args.hub_model_id or output_dir.name,
        config=model.config,
        processor=trainer.data_collator.processor,
        base=model_arguments.model_name_or_path,
        training=training,
        num_parameters=sum(sizes.values()) - lora_parameters - copied_parameters,
        is_adapter=model_arguments.use_peft,
        datasets=[dataset] if dataset else [],
    )
    write_card(output_dir, card)
