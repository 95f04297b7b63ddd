# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Conversations become padded batches, with labels where the assistant speaks."""

import multiprocessing
from collections.abc import Callable
from typing import Any, Literal

import torch
from transformers.utils import logging

from ..processing import FlorenceVLProcessor
from .conversation_data import Problem, SampleError, to_messages


logger = logging.get_logger(__name__)

IGNORED_LABEL = -100

# What a broken sample does: it is left out of its batch and counted, or it ends the run.
OnError = Literal["skip", "raise"]


class FlorenceVLCollator:
    """
    Turns rows of `load_conversations`, or any rows with `messages` and `images`, into a batch to train on.

    Rows are padded on the right. Labels are the ids of what the assistant says in any of its turns, with the end of
    the turn, and -100 elsewhere. Rows with pictures, with several, and without any may stand in one batch.

    Args:
        processor (`FlorenceVLProcessor`): The model's.
        max_length (`int`, *optional*): Rows are cut to this many tokens, those of pictures counted. A picture is never
            cut: a row whose pictures do not fit is broken.
        on_error (`str`, *optional*, defaults to `"skip"`): What a broken row does. `skip` leaves it out of the batch,
            warns, and counts it in `num_skipped`; of a batch without any sound row one row remains that has no
            labels, since other processes wait for this one. `raise` passes its `SampleError` on.
    """

    def __init__(
        self,
        processor: FlorenceVLProcessor,
        max_length: int | None = None,
        on_error: OnError = "skip",
    ) -> None:
        self.processor = processor
        self.max_length = max_length
        self.on_error = on_error
        # Shared with the processes that load the data: they collate, and this one reports.
        self._num_skipped = multiprocessing.get_context("spawn").Value("q", 0)

    @property
    def num_skipped(self) -> int:
        """Number of broken rows that were left out so far, by this process and those that load its data."""
        return self._num_skipped.value

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Returns:
            `dict[str, torch.Tensor]`: `input_ids`, `attention_mask` and `labels` of shape
            `(batch_size, sequence_length)`; `pixel_values` of shape `(num_images, 3, image_size, image_size)`, if
            there is any picture.

        Raises:
            SampleError: If a row is broken, and `on_error` is `raise`.
        """
        samples = self._sound(rows, self.encode) or [self._empty_sample()]
        length = max(len(sample["input_ids"]) for sample in samples)
        pad_token_id = self.processor.tokenizer.pad_token_id
        batch = {
            "input_ids": _pad(samples, "input_ids", length, pad_token_id),
            "attention_mask": _pad(samples, "attention_mask", length, 0),
            "labels": _pad(samples, "labels", length, IGNORED_LABEL),
        }
        pixel_values = [sample["pixel_values"] for sample in samples if "pixel_values" in sample]
        if pixel_values:
            batch["pixel_values"] = torch.cat(pixel_values)
        return batch

    def prompts(self, rows: list[dict[str, Any]]) -> tuple[dict[str, torch.Tensor], list[str]]:
        """
        What the model is asked in each row, up to its last answer, and that answer: to let the model answer itself.

        Returns:
            `tuple[dict[str, torch.Tensor], list[str]]`: Inputs of `generate`, padded on the left, and the text of the
            right answers. Both are empty if no row is sound.

        Raises:
            SampleError: If a row is broken, and `on_error` is `raise`.
        """
        conversations = self._sound(rows, to_messages)
        if not conversations:
            return {}, []
        inputs = self.processor.apply_chat_template(
            [messages[:-1] for messages in conversations],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )
        answers = ["".join(item["text"] for item in messages[-1]["content"]) for messages in conversations]
        return dict(inputs), answers

    def _sound(self, rows: list[dict[str, Any]], read: Callable[[dict[str, Any]], Any]) -> list[Any]:
        """What `read` makes of each row that is not broken."""
        sound = []
        for row in rows:
            try:
                sound.append(read(row))
            except SampleError as error:
                if self.on_error == "raise":
                    raise
                with self._num_skipped.get_lock():
                    self._num_skipped.value += 1
                logger.warning(f"Left out: {error}")
        return sound

    def encode(self, row: dict[str, Any]) -> dict[str, torch.Tensor]:
        """
        One row as the model's inputs.

        Returns:
            `dict[str, torch.Tensor]`: `input_ids`, `attention_mask` and `labels` of shape `(sequence_length,)`, and
            `pixel_values` of shape `(num_images, 3, image_size, image_size)`, if there is any picture.

        Raises:
            SampleError: If the row is broken, or its pictures do not fit into `max_length`.
        """
        messages = to_messages(row)
        encoded = self.processor.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            return_tensors="pt",
        )
        input_ids = encoded["input_ids"][0, : self.max_length]
        num_image_tokens = (encoded["input_ids"] == self.processor.image_token_id).sum()
        if (input_ids == self.processor.image_token_id).sum() != num_image_tokens:
            raise SampleError(
                f"Sample {row.get('id')!r}: its pictures take {num_image_tokens} tokens, which do not fit into "
                f"{self.max_length} with the text before them; raise `max_length`, or leave the sample out.",
                Problem.PICTURES_TOO_LONG,
            )
        is_said = torch.as_tensor(encoded["assistant_masks"])[0, : self.max_length].bool()
        sample = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "labels": input_ids.masked_fill(~is_said, IGNORED_LABEL),
        }
        if "pixel_values" in encoded:
            sample["pixel_values"] = encoded["pixel_values"]
        return sample

    def _empty_sample(self) -> dict[str, torch.Tensor]:
        """A row of one token that nothing is learned from."""
        input_ids = torch.tensor([self.processor.tokenizer.eos_token_id])
        return {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "labels": torch.full_like(input_ids, IGNORED_LABEL),
        }


def _pad(samples: list[dict[str, torch.Tensor]], name: str, length: int, value: int) -> torch.Tensor:
    return torch.stack(
        [torch.nn.functional.pad(sample[name], (0, length - len(sample[name])), value=value) for sample in samples]
    )


__all__ = ["IGNORED_LABEL", "FlorenceVLCollator", "OnError"]
