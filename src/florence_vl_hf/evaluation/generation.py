# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Answers of a model on this machine, in batches of samples of similar length."""

from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import torch
from jinja2 import TemplateError
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature

from ..modeling import FlorenceVLForConditionalGeneration
from ..modeling.generation_florence_vl import GREEDY
from ..processing import FlorenceVLProcessor
from ..processing.chat_templates import require_chat_template
from ..serving import DECODING
from ..training.samples import Problem, SampleError
from .questions import open_question


def generate_answers(
    samples: datasets.Dataset,
    indices: Sequence[int],
    model: FlorenceVLForConditionalGeneration,
    processor: FlorenceVLProcessor,
    max_new_tokens: int,
    batch_size: int,
) -> Iterator[tuple[int, str | SampleError]]:
    """
    Generate answers greedily. Other settings are those of the model's generation configuration.

    Args:
        samples (`datasets.Dataset`): Samples of `load_questions`.
        indices (`Sequence[int]`): Which samples to answer. Consecutive ones form a batch, padded on the left.

    Yields:
        `tuple[int, str | SampleError]`: The index of a sample, and its answer or what is wrong with it.
    """
    require_chat_template(processor)
    max_length = model.config.text_config.max_position_embeddings
    for start in range(0, len(indices), batch_size):
        encoded: dict[int, dict[str, torch.Tensor]] = {}
        for index in indices[start : start + batch_size]:
            try:
                encoded[index] = _encode(samples[index], processor, max_length)
            except SampleError as error:
                yield index, error
        if encoded:
            inputs = _pad(list(encoded.values()), processor).to(model.device)
            output_ids = model.generate(**inputs, **GREEDY, max_new_tokens=max_new_tokens)
            for index, answer_ids in zip(encoded, output_ids[:, inputs["input_ids"].shape[1] :], strict=True):
                yield index, processor.decode(answer_ids, **DECODING).strip()


def _encode(sample: dict[str, Any], processor: FlorenceVLProcessor, max_length: int) -> dict[str, torch.Tensor]:
    messages = open_question(sample)
    try:
        encoded = processor.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    except (ValueError, TemplateError) as error:  # of the processor, or of the chat template
        raise SampleError(" ".join(str(error).split())) from error
    if (num_tokens := encoded["input_ids"].shape[1]) > max_length:
        reason = f"It has {num_tokens:,} tokens, the model supports {max_length:,}; shorten it."
        raise SampleError(reason, Problem.TOO_LONG)
    return encoded


def _pad(encoded: list[dict[str, torch.Tensor]], processor: FlorenceVLProcessor) -> BatchFeature:
    padding = {"input_ids": processor.tokenizer.pad_token_id, "attention_mask": 0}
    batch = {
        name: pad_sequence(
            [sample[name][0] for sample in encoded], batch_first=True, padding_value=value, padding_side="left"
        )
        for name, value in padding.items()
    }
    if pixel_values := [sample["pixel_values"] for sample in encoded if "pixel_values" in sample]:
        batch["pixel_values"] = torch.cat(pixel_values)
    return BatchFeature(batch)


__all__ = ["generate_answers"]
