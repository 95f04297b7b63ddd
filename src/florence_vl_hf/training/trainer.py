# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Transformers' `Trainer`, with learning rates per part and answers in evaluation."""

from collections.abc import Callable, Iterator
from itertools import chain, islice, repeat
from math import ceil
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm
from transformers import PreTrainedModel, Trainer
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import EvalLoopOutput

from .arguments import FlorenceVLTrainingArguments
from .collator import IGNORED_LABEL, FlorenceVLCollator
from .stages import parameter_groups


# Takes answers and references, of equal number, and returns numbers by name.
AnswerMetric = Callable[[list[str], list[str]], dict[str, float]]


def exact_match(answers: list[str], references: list[str]) -> dict[str, float]:
    """Share of answers that equal their reference, but for white space around them."""
    num_equal = sum(a.strip() == b.strip() for a, b in zip(answers, references, strict=True))
    return {"exact_match": num_equal / len(references) if references else 0.0}


def learned_positions(labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    What lets a model leave out the logits that no label is compared with, of pictures above all: the loss is the same.

    Logits are most of a step's memory.

    Args:
        labels (`torch.Tensor` of shape `(batch_size, sequence_length)`): -100 where nothing is learned.

    Returns:
        `dict[str, torch.Tensor]`: Inputs of `forward`: `logits_to_keep` of shape `(num_kept,)`, and `shift_labels` of
        shape `(batch_size, num_kept)`, the next token's label at each of these positions.
    """
    shift_labels = torch.nn.functional.pad(labels, (0, 1), value=IGNORED_LABEL)[:, 1:]
    logits_to_keep = shift_labels.ne(IGNORED_LABEL).any(dim=0).nonzero().flatten()
    if not len(logits_to_keep):
        # No position at all would leave the loss without a gradient.
        logits_to_keep = labels.new_zeros(1)
    return {"logits_to_keep": logits_to_keep, "shift_labels": shift_labels[:, logits_to_keep]}


class FlorenceVLTrainer(Trainer):
    """
    A `Trainer` of Florence-VL models, for rows of conversations.

    Beside what `Trainer` does: learning rates of tower and projector (`args.projector_learning_rate`,
    `args.vision_tower_learning_rate`); in evaluation, answers that the model generates (`args.predict_with_generate`);
    folders that load also where this package is not installed; and the number of broken samples in the logs.

    Args:
        model (`FlorenceVLForConditionalGeneration` or `peft.PeftModel`): After `set_trainable`, or with adapters.
        args (`FlorenceVLTrainingArguments`): As of `Trainer`.
        data_collator (`FlorenceVLCollator`): Rows become batches by it, and in evaluation also prompts.
        answer_metric (`Callable`, *optional*): Measures generated answers; `exact_match` by default.
        kwargs: Of `Trainer`.
    """

    args: FlorenceVLTrainingArguments
    data_collator: FlorenceVLCollator

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
        # Writes the card in place of `Trainer`'s draft, once set by who knows more of the run.
        self.write_card: Callable[[], None] | None = None
        if args.label_smoothing_factor:
            raise ValueError(
                "Got `label_smoothing_factor`, which `Trainer` applies to labels that are not shifted for models that "
                "it does not know: the model would learn to repeat its input. Leave it out."
            )
        if args.predict_with_generate and is_deepspeed_zero3_enabled():
            raise ValueError(
                "Got `predict_with_generate` under ZeRO-3, where processes wait for each other forever if not all of "
                "them answer questions about pictures; take ZeRO-2 or FSDP2, or measure answers of the saved model."
            )

    def get_optimizer_cls_and_kwargs(
        self, args: FlorenceVLTrainingArguments, model: PreTrainedModel | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """As in `Trainer`, with the trained parameters grouped by their part's learning rate, where one is given."""
        optimizer_cls, optimizer_kwargs = super().get_optimizer_cls_and_kwargs(args, model)
        learning_rates = {"projector": args.projector_learning_rate, "vision_tower": args.vision_tower_learning_rate}
        # Some optimizers bring parameter groups of their own.
        if any(rate is not None for rate in learning_rates.values()) and "params" not in optimizer_kwargs:
            model = self.model if model is None else model
            decay_parameters = set(self.get_decay_parameter_names(model))
            optimizer_kwargs["params"] = parameter_groups(model, decay_parameters, args.weight_decay, learning_rates)
        return optimizer_cls, optimizer_kwargs

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], torch.Tensor | int | None]:
        """As in `Trainer`; but a run that had ended has no batch left when it is started again."""
        if self.state.global_step >= self.state.max_steps:
            # `Trainer` would take one step more than `max_steps`.
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """As in `Trainer`; the loss of a batch without labels, all of whose samples are broken, is zero."""
        # Not the mean over no label, which is not a number.
        if num_items_in_batch is None:
            if not inputs["labels"][..., 1:].ne(IGNORED_LABEL).any():
                num_items_in_batch = 1
        else:
            num_items_in_batch = torch.as_tensor(num_items_in_batch).clamp(min=1)
        # Whoever asks for outputs wants logits of all positions, and so does another loss than the model's own.
        if self.compute_loss_func is None and not return_outputs and self.args.n_gpu <= 1:
            inputs = {**inputs, **learned_positions(inputs["labels"])}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As in `Trainer`; with `predict_with_generate`, also measures answers of the model."""
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
        )
        if self.args.predict_with_generate:
            answers, references = self.generate_answers(dataloader.dataset)
            measured = self._measure(answers, references)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in measured.items()})
        return output

    def _measure(self, answers: list[str], references: list[str]) -> dict[str, float]:
        measured = self.answer_metric(answers, references)
        try:
            # Numbers of numpy or torch would not go into logs.
            return {str(name): float(value) for name, value in measured.items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"The answer metric returned {measured!r}, expected numbers by name, such as {{'accuracy': 0.5}}."
            ) from error

    def generate_answers(self, dataset: Any) -> tuple[list[str], list[str]]:
        """
        Let the model answer the last question of each row, greedily. Processes share the rows.

        Args:
            dataset (`datasets.Dataset` or any sequence): Rows of conversations.

        Returns:
            `tuple[list[str], list[str]]`: Answers of the model, and the right ones. Broken rows are left out of both.
        """
        model = self.accelerator.unwrap_model(self.model).eval()
        own_rows = Subset(dataset, range(self.args.process_index, len(dataset), self.args.world_size))
        prompts = DataLoader(
            own_rows,
            batch_size=self.args.eval_batch_size,
            collate_fn=self.data_collator.prompts,
            num_workers=self.args.dataloader_num_workers,
        )
        # As many as the first process has, which has most.
        num_batches = ceil(ceil(len(dataset) / self.args.world_size) / self.args.eval_batch_size)
        batches = chain(prompts, repeat(({}, [])))
        pairs: list[tuple[str, str]] = []
        for inputs, references in tqdm(
            islice(batches, num_batches), "Answering", num_batches, disable=self.args.disable_tqdm, leave=False
        ):
            if not references:
                if not self.is_fsdp_enabled:
                    continue
                # Others wait for this one's share of the weights: it talks to itself.
                inputs = {"input_ids": torch.tensor([[self.data_collator.processor.tokenizer.eos_token_id]])}
            inputs = self._prepare_inputs(inputs)
            with torch.no_grad(), self.compute_loss_context_manager():
                output_ids = model.generate(
                    **inputs,
                    max_new_tokens=self.args.generation_max_new_tokens,
                    do_sample=False,
                    use_cache=True,
                    # Transformers sees by itself that weights are divided under ZeRO-3, but not under FSDP2.
                    synced_gpus=self.is_fsdp_enabled,
                )
            answers = self.data_collator.processor.batch_decode(
                output_ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
            pairs += zip(answers, references, strict=bool(references))
        pairs = gather_object(pairs)
        return [answer for answer, _ in pairs], [reference for _, reference in pairs]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `Trainer`, with the number of samples that this process left out because they are broken."""
        if self.data_collator.num_skipped:
            logs["skipped_samples"] = self.data_collator.num_skipped
        super().log(logs, start_time)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As in `Trainer`, unless there is a `write_card`. Uploads make the card anew, so it is written here alone."""
        if self.write_card is None:
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            self.write_card()

    def total_skipped(self) -> int:
        """How often all processes together left a broken sample out. All of them must ask."""
        counted = torch.tensor(self.data_collator.num_skipped, device=self.args.device)
        return int(self.accelerator.reduce(counted, reduction="sum"))


__all__ = ["AnswerMetric", "FlorenceVLTrainer", "exact_match"]
