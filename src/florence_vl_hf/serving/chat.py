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
        self.images = processor.image_processor.fetch_images(list(images))
        self.messages: list[dict[str, Any]] = []
        self.image_features = None
        if self.images:
            pixel_values = processor.image_processor(self.images, return_tensors="pt").pixel_values
            with torch.inference_mode():
                self.image_features = model.get_image_features(pixel_values.to(model.device), return_dict=True)

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
        content: list[dict[str, Any]] = [{"type": "text", "text": question}]
        if not self.messages:
            content = [{"type": "image", "image": image} for image in self.images] + content
        messages = [*self.messages, {"role": "user", "content": content}]
        inputs = self.processor.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device)
        # Features replace the pixels, so the vision tower does not run again.
        inputs.pop("pixel_values", None)
        if self.images:
            inputs["mm_encoder_outputs"] = {"image": self.image_features}
        output_ids = self.model.generate(  # type: ignore[misc]  # upstream's type of `self`
            **inputs, streamer=streamer, generation_config=generation_config
        )
        new_ids = output_ids[0, inputs["input_ids"].shape[1] :]
        answer = self.processor.decode(new_ids, skip_special_tokens=True).strip()
        self.messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        return answer


__all__ = ["ChatSession"]
