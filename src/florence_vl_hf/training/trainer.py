# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Transformers' `Trainer` with learning rates per part of the model, and generated answers in evaluation."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from transformers.utils import logging

from .arguments import FlorenceVLTrainingArguments
from .collator import IGNORED_LABEL, FlorenceVLCollator
from .stages import part_of, register_training_hook


logger = logging.get_logger(__name__)

# Takes a list of answers and a list of references, and returns a dict of floats.
AnswerMetric = Callable[[list[str], list[str]], dict[str, float]]


def exact_match(answers: list[str], references: list[str]) -> dict[str, float]:
    """Compute the share of answers that equal their reference, except for white space around them."""
    num_equal = sum(a.strip() == b.strip() for a, b in zip(answers, references, strict=True))
    return {"exact_match": num_equal / len(references) if references else 0.0}


def learned_positions(labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    Select the positions that have labels, so that the model computes logits, most of a step's memory, only there.

    Args:
        labels (`torch.Tensor` of shape `(batch_size, sequence_length)`): -100 where nothing is learned.

    Returns:
        `dict[str, torch.Tensor]`: Arguments of `forward`, with the same loss: `logits_to_keep` of shape `(num_kept,)`,
        and `shift_labels` of shape `(batch_size, num_kept)`, the next token's label at each of these positions.
    """
    shift_labels = torch.nn.functional.pad(labels, (0, 1), value=IGNORED_LABEL)[:, 1:]
    logits_to_keep = shift_labels.ne(IGNORED_LABEL).any(dim=0).nonzero().flatten()
    if not len(logits_to_keep):
        # Without any position, the loss would have no gradient.
        logits_to_keep = labels.new_zeros(1)
    return {"logits_to_keep": logits_to_keep, "shift_labels": shift_labels[:, logits_to_keep]}


class TrainingError(RuntimeError):
    """Raised for a run that has no result."""


class FlorenceVLTrainer(Trainer):
    """
    A `Trainer` for Florence-VL models and datasets of conversations.

    It adds learning rates of projector and vision tower, generated answers in evaluation, the number of skipped
    samples in the logs, and `register_training_hook`. `eval_loss` is the mean loss of valid samples, and a run that
    learns nothing is an error.

    Args:
        model (`FlorenceVLForConditionalGeneration` or `peft.PeftModel`): After `set_trainable`, or with adapters.
        args (`FlorenceVLTrainingArguments`): As in `Trainer`.
        data_collator (`FlorenceVLCollator`): Builds the batches.
        answer_metric (`Callable`, *optional*): Metric of generated answers; `exact_match` by default.
        kwargs: As in `Trainer`.
    """

    args: FlorenceVLTrainingArguments
    data_collator: FlorenceVLCollator
    # Writes the model card instead of `Trainer`, if set.
    write_card: Callable[[], None] | None = None

    def __init__(
        self,
        model: torch.nn.Module,
        args: FlorenceVLTrainingArguments,
        data_collator: FlorenceVLCollator,
        answer_metric: AnswerMetric = exact_match,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("processing_class", data_collator.processor)
        super().__init__(model=model, args=args, data_collator=data_collator, **kwargs)
        self.answer_metric = answer_metric
        self._last_loss: torch.Tensor | None = None
        self._num_learned: torch.Tensor | int = 0
        if args.label_smoothing_factor:
            # `Trainer` would apply it to labels that are not shifted: the model would learn to repeat its input.
            raise ValueError("Got `label_smoothing_factor`, which is not supported; remove it.")
        if args.predict_with_generate and is_deepspeed_zero3_enabled():
            # Processes with and without images would wait for each other forever.
            raise ValueError("Got `predict_with_generate` with ZeRO-3, which is not supported; use ZeRO-2 or FSDP2.")

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As in `Trainer`, with parameter groups of their own for parts of the model with their own learning rates."""
        is_given = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if is_given:
            return optimizer
        rates = {"projector": self.args.projector_learning_rate, "vision_tower": self.args.vision_tower_learning_rate}
        model = self.model if model is None else model
        part_rates = {parameter: rates.get(part_of(name)) for name, parameter in model.named_parameters()}
        for group in list(optimizer.param_groups):
            for rate in {part_rates[parameter] for parameter in group["params"]} - {None}:
                own = [parameter for parameter in group["params"] if part_rates[parameter] == rate]
                group["params"] = [parameter for parameter in group["params"] if part_rates[parameter] != rate]
                optimizer.add_param_group({**group, "params": own, "lr": rate})
        return optimizer

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], torch.Tensor | int | None]:
        """As in `Trainer`, without another step when a run that had ended is resumed."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As in `Trainer`; the loss of a batch without labels, whose samples are all broken, is zero, not NaN."""
        # Here the model is wrapped, in training and in evaluation.
        register_training_hook(model)
        if num_items_in_batch is not None:
            num_items_in_batch = torch.as_tensor(num_items_in_batch).clamp(min=1)
        elif not inputs["labels"][..., 1:].ne(IGNORED_LABEL).any():
            num_items_in_batch = 1
        # Outputs and other losses than the model's own require the logits of all positions.
        if self.compute_loss_func is None and not return_outputs and self.args.n_gpu <= 1:
            inputs = {**inputs, **learned_positions(inputs["labels"])}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in `Trainer`; a run that learned nothing, or whose loss is not finite at its end, is an error."""
        # A run that has learned nothing saves no checkpoint.
        self._num_learned = int(bool(resume_from_checkpoint))
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        self._check_loss()
        if self._last_loss is not None and not self._has_learned():
            raise TrainingError("All samples are broken, so nothing is learned; `florence-vl check-data` lists them.")
        return output

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """As in `Trainer`; a loss that is not finite in the first step is an error."""
        is_first = self._last_loss is None
        self._num_learned += inputs["labels"][..., 1:].ne(IGNORED_LABEL).sum()
        self._last_loss = super().training_step(model, inputs, *args, **kwargs)
        if is_first:
            self._check_loss()
        return self._last_loss

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """As in `Trainer`, if there is anything to resume."""
        self._check_loss()
        if self._has_learned():
            super()._save_checkpoint(*args, **kwargs)

    def _check_loss(self) -> None:
        """Raise an error if the last loss is not finite. Every process must call it."""
        if self._last_loss is not None and self._sum_over_processes(~self._last_loss.isfinite()):
            raise TrainingError(
                f"The loss is not finite at step {self.state.global_step}, so nothing is saved; use a lower learning "
                f"rate, or bfloat16 in place of float16."
            )

    def _has_learned(self) -> bool:
        return self._sum_over_processes(self._num_learned) > 0

    def _sum_over_processes(self, number: torch.Tensor | int) -> int:
        number = torch.as_tensor(number, dtype=torch.int64, device=self.args.device)
        return int(self.accelerator.reduce(number, reduction="sum"))

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As in `Trainer`; the loss is the mean over valid samples, and generated answers are measured."""
        self._losses: list[float] = []
        self._answers: list[tuple[str, str]] = []
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        metrics = {name: value for name, value in (output.metrics or {}).items() if name != f"{prefix}_loss"}
        if not self._losses:
            logger.warning("All samples are broken, so there is no result; `florence-vl check-data` lists them.")
            return output._replace(metrics=metrics)
        metrics[f"{prefix}_loss"] = sum(self._losses) / len(self._losses)
        if self.args.predict_with_generate:
            answers, references = ([pair[i] for pair in self._answers] for i in range(2))
            measured = self.answer_metric(answers, references)
            try:
                # Logs cannot hold the floats of numpy or torch.
                metrics |= {f"{prefix}_{name}": float(value) for name, value in measured.items()}
            except (AttributeError, TypeError, ValueError) as error:
                raise ValueError(f"The answer metric returned {measured!r}, expected a dict of floats.") from error
        return output._replace(metrics=metrics)

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        """As in `Trainer`; also gathers the loss of each valid sample, and with `predict_with_generate` its answer."""
        inputs = self._prepare_inputs(inputs)
        self._losses += self._gather(self.sample_losses(model, inputs))
        if self.args.predict_with_generate:
            self._answers += self._gather(self.generate_answers(inputs))
        if prediction_loss_only:
            return None, None, None
        return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)

    @torch.no_grad()
    def sample_losses(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> list[float]:
        """Compute the mean loss of the answers of each sample of a batch. Rows without labels are left out."""
        if isinstance(model, torch.nn.DataParallel):  # would split `logits_to_keep`
            model = model.module
        register_training_hook(model)
        inputs = dict(inputs)
        kept = learned_positions(inputs.pop("labels"))
        with self.compute_loss_context_manager():
            logits = model(**inputs, logits_to_keep=kept["logits_to_keep"]).logits
        labels = kept["shift_labels"]  # (batch_size, num_kept)
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="none"
        ).view_as(labels)
        num_labels = labels.ne(IGNORED_LABEL).sum(dim=1)
        return (losses.sum(dim=1) / num_labels)[num_labels > 0].tolist()

    def _gather(self, results: list[Any]) -> list[Any]:
        """Gather the results of a batch's valid samples from all processes."""
        # Equally many of each process: `gather_for_metrics` drops the samples that fill the last batch by position.
        padded = results + [None] * (self.args.eval_batch_size - len(results))
        gathered = self.accelerator.gather_for_metrics(padded, use_gather_object=True)
        return [result for result in gathered if result is not None]

    def generate_answers(self, inputs: dict[str, torch.Tensor]) -> list[tuple[str, str]]:
        """
        Generate the last answer of each sample of a batch, greedily.

        Args:
            inputs (`dict[str, torch.Tensor]`): A batch of the collator. Rows without labels are left out.

        Returns:
            `list[tuple[str, str]]`: Generated answers and references.
        """
        model, processor = self.accelerator.unwrap_model(self.model).eval(), self.data_collator.processor
        prompts, references = [], []
        for input_ids, labels in zip(inputs["input_ids"], inputs["labels"], strict=True):
            is_answer = labels != IGNORED_LABEL
            starts = 1 + (is_answer[1:] & ~is_answer[:-1]).nonzero().flatten()
            start = int(starts[-1]) if len(starts) else len(labels)
            prompts.append(input_ids[:start])
            references.append(labels[start:][is_answer[start:]])
        prompt_ids = pad_sequence(prompts, True, processor.tokenizer.pad_token_id, padding_side="left")
        with self.compute_loss_context_manager():
            output_ids = model.generate(
                input_ids=prompt_ids,
                attention_mask=pad_sequence(list(map(torch.ones_like, prompts)), True, padding_side="left"),
                **{name: value for name, value in inputs.items() if name == "pixel_values"},
                max_new_tokens=self.args.generation_max_new_tokens,
                do_sample=False,
                use_cache=True,
                # Transformers detects that weights are sharded by ZeRO-3, but not by FSDP2.
                synced_gpus=self.is_fsdp_enabled,
            )
        decoded = (
            processor.batch_decode(ids, skip_special_tokens=True)
            for ids in (output_ids[:, prompt_ids.shape[1] :], references)
        )
        return [(answer, text) for answer, text, ids in zip(*decoded, references, strict=True) if len(ids)]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `Trainer`, with the number of broken samples that this process skipped."""
        if self.data_collator.num_skipped:
            logs["skipped_samples"] = self.data_collator.num_skipped
        super().log(logs, start_time)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As in `Trainer`, or with `write_card` if it is set. `Trainer` also calls this before each upload."""
        if self.write_card is None:
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            self.write_card()

    def total_skipped(self) -> int:
        """Count the broken samples that all processes skipped. Every process must call it."""
        return self._sum_over_processes(self.data_collator.num_skipped)
