# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Padded batches of conversations, with labels on the assistant's answers."""

import multiprocessing
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging

from ..processing import FlorenceVLProcessor
from .samples import Problem, SampleError, sample_id, to_messages


logger = logging.get_logger(__name__)

IGNORED_LABEL = -100

# What to do with a broken sample: skip and count it, or raise its error.
OnError = Literal["skip", "raise"]
T = TypeVar("T")


class FlorenceVLCollator:
    """
    Pad a batch of samples and build labels.

    Samples are padded on the right. Labels are the token ids of all answers of the assistant, with the end of each
    turn, and -100 elsewhere. A batch may mix samples with one image, with several, and without any.

    Args:
        processor (`FlorenceVLProcessor`): The model's processor.
        max_length (`int`, *optional*): Samples are truncated to this many tokens, image tokens included. Images are
            never truncated: a sample whose images do not fit is broken.
        on_error (`str`, *optional*, defaults to `"skip"`): What to do with a broken sample. `skip` removes it from the
            batch, warns, and counts it in `num_skipped`; if no sample is left, the batch is one token without labels,
            because other processes wait for this one. `raise` raises its `SampleError`.
    """

    def __init__(
        self, processor: FlorenceVLProcessor, max_length: int | None = None, on_error: OnError = "skip"
    ) -> None:
        self.processor = processor
        self.max_length = max_length
        self.on_error = on_error
        # Shared with the workers of a `DataLoader`, which collate.
        self._num_skipped = multiprocessing.get_context("spawn").Value("q", 0)

    @property
    def num_skipped(self) -> int:
        """The number of broken samples skipped so far, by this process and its data workers."""
        return self._num_skipped.value

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Collate samples of `load_conversations`, or any that `to_messages` accepts.

        Returns:
            `dict[str, torch.Tensor]`: `input_ids`, `attention_mask` and `labels` of shape
            `(batch_size, sequence_length)`; with images, `pixel_values` of shape
            `(num_images, 3, image_size, image_size)`.

        Raises:
            SampleError: If a sample is broken and `on_error` is `raise`.
        """
        encoded = self._skip_broken(samples, self.encode) or [self._empty_sample()]
        pad_token_id = self.processor.tokenizer.pad_token_id
        padding = {"input_ids": pad_token_id, "attention_mask": 0, "labels": IGNORED_LABEL}
        batch = {
            name: pad_sequence([sample[name] for sample in encoded], batch_first=True, padding_value=value)
            for name, value in padding.items()
        }
        pixel_values = [sample["pixel_values"] for sample in encoded if "pixel_values" in sample]
        if pixel_values:
            batch["pixel_values"] = torch.cat(pixel_values)
        return batch

    def prompts(self, samples: list[dict[str, Any]]) -> tuple[dict[str, torch.Tensor], list[str]]:
        """
        Build the prompts of samples up to their last answers, for evaluation with `generate`.

        Returns:
            `tuple[dict[str, torch.Tensor], list[str]]`: The inputs of `generate`, padded on the left, and the last
            answers. Both are empty if all samples are broken.

        Raises:
            SampleError: If a sample is broken and `on_error` is `raise`.
        """
        conversations = self._skip_broken(samples, to_messages)
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

    def encode(self, sample: dict[str, Any]) -> dict[str, torch.Tensor]:
        """
        Encode one sample.

        Returns:
            `dict[str, torch.Tensor]`: `input_ids`, `attention_mask` and `labels` of shape `(sequence_length,)`; with
            images, `pixel_values` of shape `(num_images, 3, image_size, image_size)`.

        Raises:
            SampleError: If the sample is broken, or its images do not fit into `max_length`.
        """
        encoded = self.processor.apply_chat_template(
            to_messages(sample),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            # Token ids as lists: Transformers walks through them to build the mask, which is slow with tensors.
            processor_kwargs={"images_kwargs": {"return_tensors": "pt"}, "text_kwargs": {"verbose": False}},
        )
        image_token_id = self.processor.image_token_id
        ids = encoded["input_ids"][0]
        num_image_tokens = ids.count(image_token_id)
        if ids[: self.max_length].count(image_token_id) != num_image_tokens:
            reason = (
                f"Its images take {num_image_tokens} tokens, which do not fit into {self.max_length} with the text "
                f"before them; increase `max_length`, or remove the sample."
            )
            raise SampleError(reason, Problem.IMAGES_TOO_LONG, sample_id(sample))
        input_ids = torch.tensor(ids[: self.max_length])
        is_answer = torch.tensor(encoded["assistant_masks"][0][: self.max_length], dtype=torch.bool)
        labels = input_ids.masked_fill(~is_answer, IGNORED_LABEL)
        features = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}
        return features | ({"pixel_values": encoded["pixel_values"]} if "pixel_values" in encoded else {})

    def _skip_broken(self, samples: list[dict[str, Any]], read: Callable[[dict[str, Any]], T]) -> list[T]:
        results = []
        for sample in samples:
            try:
                results.append(read(sample))
            except SampleError as error:
                if self.on_error == "raise":
                    raise
                with self._num_skipped.get_lock():
                    self._num_skipped.value += 1
                logger.warning(f"Skipping a broken sample. {error}")
        return results

    def _empty_sample(self) -> dict[str, torch.Tensor]:
        input_ids = torch.tensor([self.processor.tokenizer.eos_token_id])
        labels = torch.full_like(input_ids, IGNORED_LABEL)
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}


__all__ = ["IGNORED_LABEL", "FlorenceVLCollator", "OnError"]
