# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Padded batches of conversations, with labels on the assistant's answers."""

import multiprocessing
import sys
from functools import cached_property
from typing import Any, Literal

import torch
from torch._utils import ExceptionWrapper
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import get_worker_info
from transformers.utils import logging

from ..processing import FlorenceVLProcessor
from .samples import (
    MAX_IMAGE_SIDE,
    Problem,
    SampleError,
    open_image,
    read_sample,
    require_answer,
    sample_id,
    with_images,
)


logger = logging.get_logger(__name__)

IGNORED_LABEL = -100

# What to do with a broken sample: skip and count it, or raise its error.
OnError = Literal["skip", "raise"]


class _WorkerError(ExceptionWrapper):
    """An error of a data worker. `DataLoader` would put the worker's traceback into the message."""

    def __init__(self, error: SampleError) -> None:
        self.error = error

    def reraise(self) -> None:
        raise self.error


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
        max_image_side (`int`, *optional*, defaults to 12,000): A sample whose image has a longer side is broken.
    """

    def __init__(
        self,
        processor: FlorenceVLProcessor,
        max_length: int | None = None,
        on_error: OnError = "skip",
        max_image_side: int = MAX_IMAGE_SIDE,
    ) -> None:
        self.processor = processor
        self.max_length = max_length
        self.on_error = on_error
        self.max_image_side = max_image_side
        # Shared with the workers of a `DataLoader`, which collate.
        self._num_skipped = multiprocessing.get_context("spawn").Value("q", 0)

    @property
    def num_skipped(self) -> int:
        """The number of broken samples skipped so far, by this process and its data workers."""
        return self._num_skipped.value

    def __call__(self, samples: list[dict[str, Any]]) -> Any:
        """
        Collate samples of `load_conversations`, or any that `to_messages` accepts.

        Returns:
            `dict[str, torch.Tensor]`: `input_ids`, `attention_mask` and `labels` of shape
            `(batch_size, sequence_length)`; with images, `pixel_values` of shape
            `(num_images, 3, image_size, image_size)`.

        Raises:
            SampleError: If a sample is broken and `on_error` is `raise`.
        """
        tokenizer = self.processor.tokenizer
        token = {"input_ids": tokenizer.eos_token_id, "attention_mask": 1, "labels": IGNORED_LABEL}
        padding = {**token, "input_ids": tokenizer.pad_token_id, "attention_mask": 0}
        encoded = []
        for sample in samples:
            try:
                encoded.append(self.encode(sample))
            except SampleError as error:
                error.sample_id = sample_id(sample)
                if self.on_error == "raise":
                    if get_worker_info() is None:
                        raise
                    return _WorkerError(error)
                with self._num_skipped.get_lock():
                    self._num_skipped.value += 1
                logger.warning(f"Skipping a broken sample. {error}")
        encoded = encoded or [{name: torch.tensor([i]) for name, i in token.items()}]
        batch = {
            name: pad_sequence([sample[name] for sample in encoded], batch_first=True, padding_value=value)
            for name, value in padding.items()
        }
        if images := [torch.as_tensor(image) for sample in encoded for image in sample.get("pixel_values", ())]:
            batch["pixel_values"] = torch.stack(images)
        return batch

    def encode(self, sample: dict[str, Any]) -> dict[str, Any]:
        """
        Encode one sample, or raise a `SampleError`.

        Returns:
            `dict[str, Any]`: `input_ids`, `attention_mask` and `labels` of shape `(sequence_length,)`; with images,
            `pixel_values`, one array of shape `(3, image_size, image_size)` per image.
        """
        messages, images = read_sample(sample)
        messages = self.shorten(messages)
        opened = [open_image(image, self.max_image_side) for image in images]
        return self.truncate(self.tokenize(with_images(messages, opened)))

    def shorten(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Remove text that `max_length` truncates in any case, since it takes time and memory to encode."""
        require_answer(messages)
        # In characters. Each message has a token at least.
        num_left = sys.maxsize if self.max_length is None else self.max_length * self._longest_token
        shortened: list[dict[str, Any]] = []
        for message in messages:
            content = []
            for item in message["content"]:
                if item["type"] == "image":
                    content.append(item)
                    num_left -= self.processor.num_image_tokens * self._longest_token
                    if num_left < 0:
                        raise self._images_too_long()
                elif self.processor.image_token in item["text"]:
                    reason = f"Got {self.processor.image_token!r} in its text, the model's image token; remove it."
                    raise SampleError(reason, Problem.IMAGE_TOKENS)
                elif num_left > 0:
                    content.append({**item, "text": item["text"][:num_left]})
                    num_left -= len(item["text"])
            if content:
                shortened.append({**message, "content": content})
            num_left -= self._longest_token
        return shortened

    @cached_property
    def _longest_token(self) -> int:
        return max(map(len, self.processor.tokenizer.get_vocab()))

    def tokenize(self, messages: list[dict[str, Any]], **images_kwargs: Any) -> dict[str, Any]:
        """Encode messages with their images, without truncation, and build labels."""
        encoded = self.processor.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            # No tensors: Transformers walks through token ids to build the mask, and images are stacked per batch.
            processor_kwargs={"images_kwargs": images_kwargs, "text_kwargs": {"verbose": False}},
        )
        input_ids, is_answer = torch.tensor([*encoded["input_ids"], *encoded["assistant_masks"]])
        labels = input_ids.masked_fill(is_answer == 0, IGNORED_LABEL)
        features = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}
        return features | ({"pixel_values": encoded["pixel_values"]} if "pixel_values" in encoded else {})

    def truncate(self, features: dict[str, Any]) -> dict[str, Any]:
        """Truncate an encoded sample to `max_length`, or raise a `SampleError` if that leaves nothing to learn."""
        if self.max_length is not None:
            if self.processor.image_token_id in features["input_ids"][self.max_length :]:
                raise self._images_too_long()
            texts = {name: features[name][: self.max_length] for name in ("input_ids", "attention_mask", "labels")}
            features = features | texts
        # The model learns the next token: nothing comes before the first one.
        if not features["labels"][1:].ne(IGNORED_LABEL).any():
            reason = (
                f"No answer begins within max_length, {self.max_length} tokens; increase it, or use a chat template "
                f"with {{% generation %}} around the answers."
            )
            raise SampleError(reason, Problem.NOTHING_TO_LEARN)
        return features

    def _images_too_long(self) -> SampleError:
        reason = f"Its images do not fit into {self.max_length} tokens; increase max_length, or remove the sample."
        return SampleError(reason, Problem.IMAGES_TOO_LONG)


__all__ = ["IGNORED_LABEL", "FlorenceVLCollator", "OnError"]
