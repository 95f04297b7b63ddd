# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License. You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Generation of Florence-VL: no image is encoded twice, and little padding is computed."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import GenerationMixin, LogitsProcessorList, SuppressTokensLogitsProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast

from .configuration_florence_vl import FlorenceVLConfig
from .transformers_compat import CACHE


# Settings of greedy search, with the defaults of sampling: generation warns about others.
GREEDY: dict[str, Any] = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50, "max_length": None}


def encoder_outputs(features: Any) -> dict[str, BaseModelOutputWithPooling]:
    """Return what `generate` accepts in place of `pixel_values`: features of each image, in a list."""
    return {"image": BaseModelOutputWithPooling(pooler_output=features)}


class FlorenceVLGenerationMixin(GenerationMixin):
    # Of the model that this is mixed into.
    config: FlorenceVLConfig
    get_image_features: Callable[..., Any]

    @torch.no_grad()
    def generate(self, *args: Any, pixel_values: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """As in Transformers; `pixel_values` may be `None`, and equal images of a batch are encoded once."""
        if pixel_values is not None:
            if kwargs.get("mm_encoder_outputs") is not None:
                raise ValueError("You cannot specify both pixel_values and mm_encoder_outputs at the same time")
            kwargs["mm_encoder_outputs"] = encoder_outputs(self._encode_distinct_images(pixel_values))
        return super().generate(*args, **kwargs)

    def _encode_distinct_images(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        is_equal = torch.stack([(pixel_values == image).flatten(1).all(dim=1) for image in pixel_values])
        is_equal.fill_diagonal_(True)  # an image with NaN is not equal to itself
        first_equal = is_equal.int().argmax(dim=1).tolist()  # the index of the first image that equals each
        distinct = sorted(set(first_equal))
        output = self.get_image_features(pixel_values[distinct], return_dict=True)
        features = dict(zip(distinct, output.pooler_output, strict=True))
        return [features[i] for i in first_equal]

    def _prefill(
        self,
        input_ids: Any,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> Any:
        """
        As in Transformers, but where the numbers of images differ, with several forwards, almost without padding.

        In a single forward, each sample is padded by hundreds of positions for each image that it has less, which
        takes longer than one forward per sample. Samples of one length share a forward, and so do all without images.
        """
        one_forward: Callable[..., Any] = super()._prefill  # type: ignore[misc]  # upstream's type of `self`
        num_images = (input_ids == self.config.image_token_id).sum(dim=1) // self.config.num_image_tokens
        if not is_first_iteration or not self._can_prefill_apart(
            input_ids, num_images, generation_config, model_kwargs
        ):
            return one_forward(input_ids, generation_config, model_kwargs, is_first_iteration)

        features = model_kwargs["mm_encoder_outputs"]["image"].pooler_output
        images_of = torch.arange(len(features)).split(num_images.tolist())
        lengths = model_kwargs["attention_mask"].sum(dim=1)
        if (num_images == 0).any():
            lengths = lengths.where(num_images > 0, lengths[num_images == 0].max())
        logits = torch.empty(0)
        states: list[list[torch.Tensor]] = []  # keys and values of each layer
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero().flatten().tolist()  # indexes tensors of all devices
            inputs = {
                name: value[rows, -length:] if torch.is_tensor(value) and value.shape == input_ids.shape else value
                for name, value in model_kwargs.items()
            }
            images = [features[i] for row in rows for i in images_of[row]]
            inputs |= {"mm_encoder_outputs": encoder_outputs(images) if images else None, CACHE: DynamicCache()}
            outputs = one_forward(input_ids[rows, -length:], generation_config, inputs, is_first_iteration)

            if not states:
                logits = outputs.logits.new_empty(len(input_ids), 1, outputs.logits.shape[-1])
                states = [
                    [
                        part.new_zeros(len(input_ids), part.shape[1], input_ids.shape[1], part.shape[3])
                        for part in parts
                    ]
                    for parts in ((layer.keys, layer.values) for layer in outputs[CACHE].layers)
                ]
            logits[rows] = outputs.logits[:, -1:]
            for layer, (keys, values) in zip(outputs[CACHE].layers, states, strict=True):
                keys[rows, :, -length:], values[rows, :, -length:] = layer.keys, layer.values

        cache = model_kwargs[CACHE]
        for i, (keys, values) in enumerate(states):
            cache.update(keys, values, i)
        return CausalLMOutputWithPast(logits=logits, **{CACHE: cache})

    def _can_prefill_apart(
        self,
        input_ids: Any,
        num_images: torch.Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
    ) -> bool:
        encoded = (model_kwargs.get("mm_encoder_outputs") or {}).get("image")
        attention_mask, cache = model_kwargs.get("attention_mask"), model_kwargs.get(CACHE)
        return (
            encoded is not None
            and len(encoded.pooler_output) == num_images.sum()
            and len(num_images.unique()) > 1
            and attention_mask is not None
            and attention_mask.shape == input_ids.shape
            and bool(attention_mask[:, -1].all())  # padded on the left
            and type(cache) is DynamicCache
            and cache.get_seq_length() == 0
            and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
            and model_kwargs.get("inputs_embeds") is None
            and generation_config.prefill_chunk_size is None
            and not (generation_config.output_attentions or generation_config.output_hidden_states)
            # Processes that share weights must run the same number of forwards.
            and not (torch.distributed.is_available() and torch.distributed.is_initialized())
        )

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        processors = super()._get_logits_processor(*args, **kwargs)  # type: ignore[misc]  # upstream's type of `self`
        # Here and not in the generation config, which users replace: an image token without an image cannot be read.
        device = str(kwargs.get("device") or self.device)  # type: ignore[attr-defined]
        processors.append(SuppressTokensLogitsProcessor([self.config.image_token_id], device=device))
        return processors
