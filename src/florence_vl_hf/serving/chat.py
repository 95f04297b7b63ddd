# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""A chat of several turns about images, each of which is encoded once."""

import os
from collections.abc import Iterable
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from transformers import GenerationConfig, StoppingCriteriaList, image_utils
from transformers.generation.streamers import BaseStreamer

from ..modeling import FlorenceVLForConditionalGeneration
from ..modeling.generation_florence_vl import encoder_outputs
from ..modeling.modeling_florence_vl import FlorenceVLImageFeaturesOutput
from ..processing import FlorenceVLProcessor
from ..processing.chat_templates import require_chat_template
from ..processing.text import to_utf8


# Seconds after which a server that sends nothing is given up.
DOWNLOAD_TIMEOUT = 30

# Transformers ignores `clean_up_tokenization_spaces=True` of most tokenizers with a warning.
DECODING = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}


def load_image(path_or_url: str) -> Image.Image:
    """
    Load an image from a file or a URL, upright and in RGB.

    Raises:
        ValueError: If it cannot be read. The message is one line.
    """
    if not path_or_url.startswith(("http://", "https://")) and not os.path.isfile(path_or_url):
        raise ValueError(f"There is no image {path_or_url}; give the path of a file, or a URL (http or https).")
    try:
        return image_utils.load_image(path_or_url, timeout=DOWNLOAD_TIMEOUT)
    except Exception as error:  # Pillow's decoders and the HTTP client raise many types
        reason = "no known image format" if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split())
        raise ValueError(f"{path_or_url} cannot be read as an image ({reason}); give another.") from error


class ChatSession:
    """
    Chat about images, with the history of all turns.

    Args:
        model (`FlorenceVLForConditionalGeneration`): The model.
        processor (`FlorenceVLProcessor`): Its processor, with a chat template.
        images (iterable of `PIL.Image` or `str`, *optional*): Images of the first turn, as in `add_image`.
    """

    def __init__(
        self,
        model: FlorenceVLForConditionalGeneration,
        processor: FlorenceVLProcessor,
        images: Iterable[Image.Image | str] = (),
    ) -> None:
        require_chat_template(processor)
        self.model, self.processor = model, processor
        self.reset()
        for image in images:
            self.add_image(image)

    def reset(self) -> None:
        """Forget all turns and images."""
        self.messages: list[dict[str, Any]] = []
        self.new_images: list[Image.Image] = []
        # Projected features of all images in order, each of shape (num_image_tokens, text_hidden_size).
        self.features: list[torch.Tensor] = []

    def add_image(self, image: Image.Image | str) -> FlorenceVLImageFeaturesOutput:
        """
        Encode an image, add it to the next turn, and return the output of `get_image_features`.

        Args:
            image (`PIL.Image` or `str`): An image, or its path or URL.

        Raises:
            ValueError: If it cannot be read.
        """
        image = load_image(image) if isinstance(image, str) else image
        pixel_values = self.processor.image_processor(image, return_tensors="pt").pixel_values
        with torch.inference_mode():
            output = self.model.get_image_features(pixel_values.to(self.model.device), return_dict=True)
        self.new_images.append(image)
        self.features += output.pooler_output
        return output

    def answer(
        self,
        question: str,
        streamer: BaseStreamer | None = None,
        generation_config: GenerationConfig | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
    ) -> str:
        """
        Answer a question about all images so far, and add both to the history.

        Args:
            question (`str`): Text of the user's turn.
            streamer (`BaseStreamer`, *optional*): Receives each token of the answer when it is generated.
            generation_config (`GenerationConfig`, *optional*): Replaces the model's own.
            stopping_criteria (`StoppingCriteriaList`, *optional*): End the answer, which is kept.

        Raises:
            ValueError: If the question contains the image token, or the conversation is longer than the model's
                context. The history stays as it is.
        """
        if (image_token := self.processor.image_token) in question:
            raise ValueError(f"{image_token} stands for an image and cannot be part of a question; add the image.")
        text = {"type": "text", "text": to_utf8(question)}
        content = [*({"type": "image", "image": image} for image in self.new_images), text]
        messages = [*self.messages, {"role": "user", "content": content}]
        inputs = self.processor.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device)
        num_tokens, context = inputs["input_ids"].shape[1], self.model.config.text_config.max_position_embeddings
        if num_tokens > context:
            raise ValueError(
                f"The conversation has {num_tokens:,} tokens, the model supports {context:,}; shorten it."
            )
        # What `generate` takes instead of pixel values, so that the vision tower does not run again.
        if inputs.pop("pixel_values", None) is not None:
            inputs["mm_encoder_outputs"] = encoder_outputs(self.features)
        output_ids = self.model.generate(
            **inputs, streamer=streamer, generation_config=generation_config, stopping_criteria=stopping_criteria
        )
        answer = self.processor.decode(output_ids[0, num_tokens:], **DECODING).strip()
        self.messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        self.new_images = []
        return answer


__all__ = ["DECODING", "ChatSession", "load_image"]
