# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""A conversation about pictures, in several turns. The pictures are encoded once."""

from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from .modeling import FlorenceVLForConditionalGeneration
from .processing import FlorenceVLProcessor


class ChatSession:
    """
    Holds what was said about some pictures so far, and answers the next question.

    Args:
        model (`FlorenceVLForConditionalGeneration`): Answers.
        processor (`FlorenceVLProcessor`): Its processor, with a chat template.
        images (`list`): Pictures of the first turn, as paths, URLs or `PIL.Image`s. There may be none.
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
        Answer a question, and remember both.

        Args:
            question (`str`): What the user says next.
            streamer (`BaseStreamer`, *optional*): Is given each token as it comes.
            generation_config (`GenerationConfig`, *optional*): Instead of the model's own.
        """
        content: list[dict[str, Any]] = [{"type": "text", "text": question}]
        if not self.messages:
            content = [{"type": "image", "image": image} for image in self.images] + content
        messages = [*self.messages, {"role": "user", "content": content}]
        inputs = self.processor.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device)
        # The features take the place of the pixels: the tower does not run again.
        inputs.pop("pixel_values", None)
        image_inputs = {"mm_encoder_outputs": {"image": self.image_features}} if self.images else {}
        output_ids = self.model.generate(
            **inputs, **image_inputs, streamer=streamer, generation_config=generation_config
        )
        new_ids = output_ids[0, inputs["input_ids"].shape[1] :]
        answer = self.processor.decode(new_ids, skip_special_tokens=True).strip()
        self.messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        return answer


__all__ = ["ChatSession"]
