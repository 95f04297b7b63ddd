# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""A chat of several turns about images, which are encoded once."""

from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from ..modeling import FlorenceVLForConditionalGeneration
from ..processing import FlorenceVLProcessor


class ChatSession:
    """
    Chat about images, with the history of all turns.

    Args:
        model (`FlorenceVLForConditionalGeneration`): The model.
        processor (`FlorenceVLProcessor`): Its processor, with a chat template.
        images (`list`): Images of the first turn, as paths, URLs or `PIL.Image`s. May be empty.
    """

    def __init__(
        self, model: FlorenceVLForConditionalGeneration, processor: FlorenceVLProcessor, images: list[Any]
    ) -> None:
        self.model = model
        self.processor = processor
        self.images = processor.image_processor.fetch_images(images)
        self.messages: list[dict[str, Any]] = []
        # What `generate` takes instead of pixel values, so that the vision tower runs once.
        self.encoded_images: dict[str, Any] = {}
        if images:
            pixel_values = processor.image_processor(self.images, return_tensors="pt").pixel_values.to(model.device)
            with torch.inference_mode():
                features = model.get_image_features(pixel_values, return_dict=True)
            self.encoded_images = {"mm_encoder_outputs": {"image": features}}

    def answer(
        self, question: str, streamer: BaseStreamer | None = None, generation_config: GenerationConfig | None = None
    ) -> str:
        """
        Answer a question, and add both to the history.

        Args:
            question (`str`): Text of the user's turn.
            streamer (`BaseStreamer`, *optional*): Receives each token of the answer when it is generated.
            generation_config (`GenerationConfig`, *optional*): Replaces the model's own.
        """
        images = [] if self.messages else [{"type": "image", "image": image} for image in self.images]
        content = [*images, {"type": "text", "text": question}]
        messages = [*self.messages, {"role": "user", "content": content}]
        inputs = self.processor.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device)
        inputs.pop("pixel_values", None)
        output_ids = self.model.generate(
            **inputs, **self.encoded_images, streamer=streamer, generation_config=generation_config
        )
        answer = self.processor.decode(output_ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        self.messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        return answer


__all__ = ["ChatSession"]
