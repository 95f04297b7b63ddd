# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""A training run, from a recipe to a folder that loads through the Auto classes."""

import importlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, set_seed
from transformers.utils import logging

from ..modeling import FlorenceVLConfig, FlorenceVLForConditionalGeneration
from ..processing import FlorenceVLProcessor, load_chat_template
from .adapters import lora_config, quantization_config
from .arguments import DataArguments, FlorenceVLTrainingArguments, ModelArguments, parse_recipe
from .checkpoints import last_complete_checkpoint
from .collator import FlorenceVLCollator
from .conversation_data import SampleError, load_conversations, with_lengths
from .model_card import write_training_card
from .stages import STAGES, log_trained, set_trainable
from .trainer import AnswerMetric, FlorenceVLTrainer, exact_match


logger = logging.get_logger(__name__)


def train(recipe: dict[str, Any]) -> dict[str, float]:
    """
    Train a model as a recipe says, and save it with its processor and its card into `output_dir`.

    Goes on from the last complete checkpoint there, if there is one.

    Args:
        recipe (`dict[str, Any]`): Settings of `ModelArguments`, `DataArguments` and `FlorenceVLTrainingArguments`, as
            `read_recipe` gives them.

    Returns:
        `dict[str, float]`: What `Trainer` measured of the training and, at its end, of each evaluation set.

    Raises:
        ValueError: If a setting is wrong, or settings do not fit each other.
        SampleError: If a sample is broken, and `on_error` is `raise`.
    """
    model_arguments, data_arguments, args = parse_recipe(recipe)
    answer_metric = load_answer_metric(args.answer_metric)
    set_seed(args.seed)
    config = load_config(model_arguments)
    processor = load_processor(model_arguments, data_arguments, config)
    with args.main_process_first(desc="reading the data"):
        train_dataset, eval_datasets = load_datasets(data_arguments, args, config)
    model = load_model(model_arguments, args, config)

    trainer = FlorenceVLTrainer(
        model=model,
        args=args,
        data_collator=FlorenceVLCollator(processor, data_arguments.max_length, data_arguments.on_error),
        answer_metric=answer_metric,
        train_dataset=train_dataset,
        # A single evaluation set has no name.
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
        write_training_card, trainer, model_arguments, data_arguments, trainer.total_skipped(), evaluations
    )
    trainer.create_model_card()
    logger.info(f"Model, processor and card are in {args.output_dir}.")
    if args.push_to_hub:
        trainer.push_to_hub()
    return metrics


def _train_or_resume(trainer: FlorenceVLTrainer) -> dict[str, float]:
    """Train, from the last complete checkpoint on if there is one, and return what `Trainer` measured."""
    args = trainer.args
    if args.resume_from_checkpoint is not None:
        checkpoint = Path(args.resume_from_checkpoint)
        if not checkpoint.is_dir():
            raise ValueError(f"There is no checkpoint {checkpoint}, which `resume_from_checkpoint` names.")
    else:
        checkpoint = last_complete_checkpoint(args.output_dir)
        if checkpoint is not None and not args.auto_resume:
            raise ValueError(
                f"{args.output_dir} holds {checkpoint.name} of another run, but `auto_resume` is false; give the run "
                f"another `output_dir`, or remove its checkpoints."
            )
    if checkpoint is None:
        return trainer.train().metrics
    logger.info(f"Going on from {checkpoint}.")
    try:
        return trainer.train(resume_from_checkpoint=str(checkpoint)).metrics
    except SampleError:
        raise
    except (KeyError, RuntimeError, ValueError) as error:
        _, _, step = checkpoint.name.rpartition("-")
        if not step.isdigit() or trainer.state.global_step > int(step):
            raise
        raise ValueError(
            f"The run cannot go on from {checkpoint}: {error}. If the recipe was changed since, give it another "
            f"`output_dir`."
        ) from error


def _last_evaluation(trainer: FlorenceVLTrainer, prefix: str) -> dict[str, float] | None:
    """What was measured of the model as it is now, if the last step ended with an evaluation."""
    if trainer.args.load_best_model_at_end:
        return None
    of_last_step = (entry for entry in trainer.state.log_history if entry["step"] == trainer.state.global_step)
    return next((entry for entry in of_last_step if f"{prefix}_loss" in entry), None)


def load_processor(
    model_arguments: ModelArguments, data_arguments: DataArguments, config: FlorenceVLConfig
) -> FlorenceVLProcessor:
    """The model's processor, with the conversation format and the padding of pictures that the recipe asks for."""
    processor = AutoProcessor.from_pretrained(model_arguments.model_name_or_path)
    processor.num_image_tokens = config.num_image_tokens
    if data_arguments.chat_template is not None:
        processor.chat_template = load_chat_template(
            data_arguments.chat_template, processor.tokenizer, processor.image_token
        )
    if data_arguments.do_pad is not None:
        processor.image_processor.do_pad = data_arguments.do_pad
    return processor


def load_datasets(
    data_arguments: DataArguments, args: FlorenceVLTrainingArguments, config: FlorenceVLConfig
) -> tuple[Dataset, dict[str | None, Dataset]]:
    """The training set, with lengths to group samples by, and the evaluation sets by name."""
    for folder in filter(None, (data_arguments.image_folder, data_arguments.eval_image_folder)):
        if not Path(folder).is_dir():
            raise ValueError(f"There is no folder of pictures {folder}; name the one that paths are relative to.")
    train_dataset = load_conversations(
        data_arguments.train_file, data_arguments.image_folder, data_arguments.train_split
    )
    if args.train_sampling_strategy == "group_by_length":
        train_dataset = with_lengths(train_dataset, config.num_image_tokens)
    image_folder = data_arguments.eval_image_folder or data_arguments.image_folder
    eval_datasets = {
        name: load_conversations(file, image_folder, data_arguments.eval_split)
        for name, file in data_arguments.eval_files.items()
    }
    if args.eval_strategy != "no" and not eval_datasets:
        raise ValueError(f"Got `eval_strategy: {args.eval_strategy.value}` but no `eval_file`; name one.")
    return train_dataset, eval_datasets


def load_model(
    model_arguments: ModelArguments, args: FlorenceVLTrainingArguments, config: FlorenceVLConfig
) -> FlorenceVLForConditionalGeneration | PeftModel:
    """The model, of which the stage's parts are trained, with LoRA if the recipe asks for it."""
    dtype = getattr(torch, model_arguments.dtype)
    quantization = {}
    if model_arguments.num_bits is not None:
        quantization["quantization_config"] = quantization_config(model_arguments.num_bits, compute_dtype=dtype)
    model, loading = AutoModelForImageTextToText.from_pretrained(
        model_arguments.model_name_or_path,
        config=config,
        dtype=dtype,
        attn_implementation=model_arguments.attn_implementation,
        # A fusion of another width needs another first layer of the projector, and of nothing else.
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **quantization,
    )
    _check_loading(model_arguments, loading)
    if model_arguments.num_bits is not None:
        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=args.gradient_checkpointing,
            gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,
        )
    if not model_arguments.use_peft:
        set_trainable(model, model_arguments.stage)
        return model
    lora = lora_config(
        model,
        rank=model_arguments.lora_r,
        alpha=model_arguments.lora_alpha,
        dropout=model_arguments.lora_dropout,
        train_projector="projector" in STAGES[model_arguments.stage],
    )
    model = get_peft_model(model, lora)
    log_trained(model, f"Stage {model_arguments.stage} with LoRA")
    return model


def load_config(model_arguments: ModelArguments) -> FlorenceVLConfig:
    """The model's configuration, with the fusion that the recipe asks for."""
    config = AutoConfig.from_pretrained(model_arguments.model_name_or_path)
    if not isinstance(config, FlorenceVLConfig):
        raise ValueError(
            f"{model_arguments.model_name_or_path} is a {config.model_type!r}, expected a Florence-VL; "
            f"`florence-vl assemble` makes one from a Florence-2 and a language model."
        )
    changes = model_arguments.fusion_changes
    return FlorenceVLConfig.from_dict(config.to_dict() | changes) if changes else config


def _check_loading(model_arguments: ModelArguments, loading: dict[str, Any]) -> None:
    """Refuse a model that is not whole. With another fusion, the projector's first layer may be new."""
    misshapen = [name for name, *_ in loading["mismatched_keys"]]
    expected = []
    if model_arguments.fusion_changes:
        expected = [name for name in misshapen if "multi_modal_projector.layers.0." in name]
    wrong = sorted({*loading["missing_keys"], *misshapen} - {*expected})
    if wrong:
        raise ValueError(
            f"{model_arguments.model_name_or_path} lacks {len(wrong)} tensors of the model, or has them in other "
            f"shapes, such as {wrong[0]}; give a complete model."
        )
    if expected and "projector" not in STAGES[model_arguments.stage]:
        raise ValueError(
            f"The projector's first layer is new, since the fusion has another width, but stage "
            f"{model_arguments.stage!r} does not train it; take one that does, such as `projector`."
        )
    if expected:
        logger.warning("The projector's first layer starts anew, since the fusion has another width.")


def load_answer_metric(name: str) -> AnswerMetric:
    """
    What measures generated answers, by the name that a recipe gives.

    Raises:
        ValueError: If there is none of this name.
    """
    if name == "exact_match":
        return exact_match
    module_name, separator, function_name = name.partition(":")
    if not separator:
        raise ValueError(f"Got `answer_metric: {name}`, expected exact_match or package.module:function.")
    try:
        return getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"`answer_metric: {name}` cannot be imported ({error}); its module must be on PYTHONPATH."
        ) from error


__all__ = ["load_answer_metric", "load_config", "load_datasets", "load_model", "load_processor", "train"]
