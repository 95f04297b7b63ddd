# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Attention of an answer to the image tokens, word by word."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import DynamicCache

from ..modeling import FlorenceVLForConditionalGeneration
from ..modeling.generation_florence_vl import GREEDY, encoder_outputs
from ..modeling.transformers_compat import CACHE
from ..processing import FlorenceVLProcessor
from ..processing.chat_templates import require_chat_template
from ..processing.text import to_utf8


# Name of the part of fused features, where they are not the tokens of one feature.
FUSED = "fused"


@dataclass(frozen=True)
class AnswerAttention:
    """
    An answer, and how much each of its words attends to the image.

    Attributes:
        words (`list[str]`): Words of the answer, with punctuation.
        parts (`list[str]`): Names of the features whose tokens the language model gets: those of token fusion, or
            `"fused"`.
        weights (`torch.Tensor` of shape `(num_words, num_parts, num_feature_tokens)`): Attention weights, averaged
            over heads, layers and the tokens of a word. A word's sum is its share of attention to the image.
    """

    words: list[str]
    parts: list[str]
    weights: torch.Tensor


@torch.inference_mode()
def attend(
    model: FlorenceVLForConditionalGeneration,
    processor: FlorenceVLProcessor,
    image: Image.Image,
    question: str,
    layer: int | None = None,
    max_new_tokens: int = 64,
) -> AnswerAttention:
    """
    Answer a question about an image greedily, and return the attention with which each word was generated.

    The attention of a token is that of the forward which predicted it, from the position before. The answer is
    generated first; then its tokens are read one by one, so that weights of one token are in memory at a time.

    Args:
        layer (`int`, *optional*): Index of a layer of the language model. By default, the mean over all layers.

    Raises:
        ValueError: If there is no such layer, or the language model computes no attention weights.
    """
    require_chat_template(processor)
    language_model, config = model.model.language_model, model.config
    num_layers = config.text_config.num_hidden_layers
    if layer is not None and not 0 <= layer < num_layers:
        raise ValueError(f"Got layer {layer}; the language model has layers 0 to {num_layers - 1}.")
    content = [{"type": "image", "image": image}, {"type": "text", "text": to_utf8(question)}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device)
    features = model.get_image_features(inputs.pop("pixel_values"), return_dict=True).pooler_output
    output_ids = model.generate(
        **inputs, mm_encoder_outputs=encoder_outputs(features), **GREEDY, max_new_tokens=max_new_tokens
    )
    num_prompt_tokens, is_image = inputs["input_ids"].shape[1], output_ids[0] == config.image_token_id
    embeds = model.get_input_embeddings()(output_ids)  # (1, sequence_length, text_hidden_size)
    embeds[:, is_image] = torch.cat(features).to(embeds.device, embeds.dtype)

    cache = DynamicCache(config=config.text_config)
    language_model(inputs_embeds=embeds[:, : num_prompt_tokens - 1], use_cache=True, **{CACHE: cache})
    weights = []
    implementation = language_model.config._attn_implementation
    language_model.set_attn_implementation("eager")  # others return no weights
    try:
        for position in range(num_prompt_tokens - 1, output_ids.shape[1] - 1):
            step: dict[str, Any] = {"inputs_embeds": embeds[:, position : position + 1], CACHE: cache}
            attentions = language_model(**step, use_cache=True, output_attentions=True).attentions
            if not attentions or any(a is None or a.shape[-1] != position + 1 for a in attentions):
                raise ValueError(f"{type(language_model).__name__} does not return all attention weights.")
            chosen = attentions if layer is None else [attentions[layer]]
            seen = is_image[: position + 1]
            weights.append(torch.stack([a[0, :, 0, seen].float().mean(dim=0).cpu() for a in chosen]).mean(dim=0))
    finally:
        language_model.set_attn_implementation(implementation)
    parts = list(config.fusion_features) if config.fusion_strategy == "token" else [FUSED]
    words, groups = _words(processor.tokenizer, output_ids[0, num_prompt_tokens:].tolist())
    means = [torch.stack([weights[i] for i in group]).mean(dim=0).unflatten(0, (len(parts), -1)) for group in groups]
    return AnswerAttention(words, parts, torch.stack(means) if means else torch.zeros(0, len(parts), 0))


def _words(tokenizer: Any, token_ids: list[int]) -> tuple[list[str], list[list[int]]]:
    """Return the words of an answer, and the indices of each word's tokens. Special tokens belong to none."""
    decoding = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    texts = [tokenizer.decode(token_ids[:i], **decoding) for i in range(len(token_ids) + 1)]
    # Characters that are final after each token: the bytes of one can be several tokens.
    ends = [len(text.rstrip("\ufffd")) for text in texts[:-1]] + [len(texts[-1])]
    words = list(re.finditer(r"\S+", texts[-1]))
    # Tokens that end within a character belong to its word.
    spans = [(start, next((end for end in ends[i:] if end > start), start)) for i, start in enumerate(ends[:-1])]
    groups = [
        [i for i, (start, end) in enumerate(spans) if start < word.end() and end > word.start()] for word in words
    ]
    return [word[0] for word in words], groups


__all__ = ["AnswerAttention", "attend"]
