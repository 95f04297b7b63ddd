# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""A training run, from a recipe to a directory that loads through the Auto classes."""

from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import set_seed
from transformers.utils import logging

from ..conversion import check_model_type, load_pretrained
from ..modeling import FlorenceVLForConditionalGeneration
from ..processing import FlorenceVLProcessor
from .adapters import lora_config, quantization_config
from .arguments import DataArguments, FlorenceVLTrainingArguments, ModelArguments, parse_recipe
from .checkpoints import last_complete_checkpoint
from .collator import FlorenceVLCollator
from .data_loading import load_conversations, with_lengths
from .samples import SampleError
from .stages import STAGES, log_trained, set_trainable
from .trainer import AnswerMetric, FlorenceVLTrainer, exact_match
from .training_card import write_training_card


logger = logging.get_logger(__name__)


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
    """
    model_arguments, data_arguments, args = parse_recipe(recipe)
    answer_metric = load_answer_metric(args.answer_metric)
    check_model_type(model_arguments.model_name_or_path)
    set_seed(args.seed)
    with args.main_process_first(desc="reading the data"):
        train_dataset, eval_datasets = load_datasets(data_arguments, args)
    model, processor = load_model(model_arguments, data_arguments, args)
    if args.train_sampling_strategy == "group_by_length":
        with args.main_process_first(desc="computing lengths"):
            train_dataset = with_lengths(train_dataset, processor.num_image_tokens)

    trainer = FlorenceVLTrainer(
        model=model,
        args=args,
        data_collator=FlorenceVLCollator(processor, data_arguments.max_length, data_arguments.on_error),
        answer_metric=answer_metric,
        train_dataset=train_dataset,
        eval_dataset=eval_datasets.get(None, eval_datasets or None),
    )
    metrics = _train_or_resume(trainer)
    evaluations = {}
    for name, dataset in eval_datasets.items():
        prefix = "eval" if name is None else f"eval_{name}"
        measured = _last_evaluation(trainer, prefix) or trainer.evaluate(dataset, metric_key_prefix=prefix)
        evaluations[name or "evaluation"] = {
            key.removeprefix(f"{prefix}_"): value for key, value in measured.items() if key.startswith(prefix)
        }
        metrics.update(measured)

    trainer.save_model()
    trainer.save_state()
    trainer.log_metrics("all", metrics)
    trainer.save_metrics("all", metrics)
    trainer.write_card = partial(
        write_training_card,
        trainer,
        model_arguments,
        data_arguments,
        num_samples=len(train_dataset),
        num_skipped=trainer.total_skipped(),
        evaluations=evaluations,
    )
    trainer.create_model_card()
    logger.info(f"Saved the model, its processor and its model card to {args.output_dir}.")
    if args.push_to_hub:
        trainer.push_to_hub()
    return metrics


def load_answer_metric(name: str) -> AnswerMetric:
    """Return the metric of generated answers that a recipe names."""
    if name == "exact_match":
        return exact_match
    try:
        return resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"Got `answer_metric: {name}`, which cannot be imported ({error}); expected exact_match or "
            f"package.module:function, whose module is on PYTHONPATH."
        ) from error


def load_datasets(
    data_arguments: DataArguments, args: FlorenceVLTrainingArguments
) -> tuple[Dataset, dict[str | None, Dataset]]:
    """Return the training set, and the evaluation sets by name."""
    for directory in filter(None, (data_arguments.image_folder, data_arguments.eval_image_folder)):
        if not Path(directory).is_dir():
            raise ValueError(f"There is no image directory {directory}; give the one that paths are relative to.")
    if args.eval_strategy != "no" and not data_arguments.eval_files:
        raise ValueError("Got an `eval_strategy` but no `eval_file`; add one.")
    train_dataset = load_conversations(
        data_arguments.train_file, data_arguments.image_folder, data_arguments.train_split
    )
    image_folder = data_arguments.eval_image_folder or data_arguments.image_folder
    eval_datasets = {
        name: load_conversations(file, image_folder, data_arguments.eval_split)
        for name, file in data_arguments.eval_files.items()
    }
    return train_dataset, eval_datasets


def load_model(
    model_arguments: ModelArguments, data_arguments: DataArguments, args: FlorenceVLTrainingArguments
) -> tuple[FlorenceVLForConditionalGeneration | PeftModel, FlorenceVLProcessor]:
    """Load the model, whose stage's parts are trained, with LoRA if requested, and its processor."""
    dtype = getattr(torch, model_arguments.dtype)
    num_bits = model_arguments.num_bits
    quantization: dict[str, Any] = {}
    if num_bits is not None:
        quantization["quantization_config"] = quantization_config(num_bits, dtype)
    (model, loading), processor = load_pretrained(
        model_arguments.model_name_or_path,
        chat_template=data_arguments.chat_template,
        dtype=dtype,
        attn_implementation=model_arguments.attn_implementation,
        # A fused feature of another width requires another first layer of the projector, see `_check_loading`.
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **model_arguments.fusion_changes,
        **quantization,
    )
    _check_loading(model_arguments, loading)
    if data_arguments.do_pad is not None:
        processor.image_processor.do_pad = data_arguments.do_pad
    if num_bits is not None:
        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=args.gradient_checkpointing,
            gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,
        )
    if model_arguments.use_peft:
        lora = lora_config(
            model,
            rank=model_arguments.lora_r,
            alpha=model_arguments.lora_alpha,
            dropout=model_arguments.lora_dropout,
            train_projector="projector" in STAGES[model_arguments.stage],
        )
        model = get_peft_model(model, lora)
        log_trained(model, f"Stage {model_arguments.stage} with LoRA")
    else:
        set_trainable(model, model_arguments.stage)
    return model, processor


def _check_loading(model_arguments: ModelArguments, loading: dict[str, Any]) -> None:
    """Refuse an incomplete model. With another fusion, the projector's first layer may be new."""
    mismatched = {name for name, *_ in loading["mismatched_keys"]}
    new = {name for name in mismatched if model_arguments.fusion_changes and "multi_modal_projector.layers.0." in name}
    if wrong := sorted({*loading["missing_keys"], *mismatched} - new):
        raise ValueError(
            f"{len(wrong)} tensors of {model_arguments.model_name_or_path}, such as {wrong[0]}, are missing or have "
            f"another shape; give a complete model."
        )
    if new and "projector" not in STAGES[model_arguments.stage]:
        raise ValueError(
            f"The first layer of the projector is new, since the fused feature has another width, but stage "
            f"{model_arguments.stage!r} does not train it; choose one that does, such as `projector`."
        )
    if new:
        logger.warning("The first layer of the projector is new, since the fused feature has another width.")


def _train_or_resume(trainer: FlorenceVLTrainer) -> dict[str, float]:
    """Train, from the last complete checkpoint if there is one, and return the metrics."""
    args = trainer.args
    checkpoint: Path | None
    if args.resume_from_checkpoint is not None:
        checkpoint = Path(args.resume_from_checkpoint)
        if not checkpoint.is_dir():
            raise ValueError(f"There is no checkpoint {checkpoint}; correct `resume_from_checkpoint`.")
    else:
        checkpoint = last_complete_checkpoint(str(args.output_dir))
        if checkpoint is not None and not args.auto_resume:
            raise ValueError(
                f"{args.output_dir} has {checkpoint.name} of another run, but `auto_resume` is false; choose another "
                f"`output_dir`, or remove its checkpoints."
            )
    if checkpoint is None:
        return trainer.train().metrics
    logger.info(f"Resuming from {checkpoint}.")
    try:
        return trainer.train(resume_from_checkpoint=str(checkpoint)).metrics
    except SampleError:
        raise
    except (KeyError, RuntimeError, ValueError) as error:
        _, _, step = checkpoint.name.rpartition("-")
        if not step.isdigit() or trainer.state.global_step > int(step):
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
