# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Processor of Florence-VL: pictures and text with image marks become the model's inputs."""

from collections.abc import Callable
from typing import Any, ClassVar

import transformers
from transformers import BaseImageProcessor, PreTrainedTokenizerBase
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import MultiModalData, ProcessorMixin
from transformers.utils import auto_docstring

from .chat_templates import load_chat_template


@auto_docstring(
    custom_intro="""
    Wraps an image processor and a tokenizer into one processor, which puts as many image tokens into the text as the
    model has features for each image.
    """
)
class FlorenceVLProcessor(ProcessorMixin):
    # Builds processors from checkpoints of a foreign layout, once set by who knows one: whether it is one, and how.
    foreign_loader: ClassVar[tuple[Callable[..., bool], Callable[..., Any]] | None] = None

    def __init__(
        self,
        image_processor: BaseImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        num_image_tokens: int = 577,
        chat_template: str | None = None,
        image_token: str = "<image>",
    ) -> None:
        r"""
        num_image_tokens (`int`, *optional*, defaults to 577):
            Tokens of one image, `num_image_tokens` of the model's configuration.
        image_token (`str`, *optional*, defaults to `"<image>"`):
            The mark in the text that stands for one image.
        """
        self.num_image_tokens = num_image_tokens
        self.image_token = getattr(tokenizer, "image_token", None) or image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        if self.image_token_id in (None, tokenizer.unk_token_id):
            raise ValueError(
                f"The tokenizer does not know {self.image_token!r}; add it as a special token, or name the mark that "
                f"it knows as `image_token`."
            )
        super().__init__(_on_pillow(image_processor), tokenizer, chat_template=chat_template)

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """As in Transformers; `chat_template` may also name one of the package's formats, such as `plain`."""
        is_own = isinstance(self.chat_template, dict) and chat_template in self.chat_template
        # Without a brace it is a name: as the text of a template it would become the whole prompt.
        if chat_template is not None and "{" not in chat_template and not is_own:
            chat_template = load_chat_template(chat_template, self.tokenizer, self.image_token)
        return super().apply_chat_template(conversation, chat_template=chat_template, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As in Transformers; with the package installed, also of an original checkpoint as it is."""
        if cls.foreign_loader is not None:
            is_foreign, load_foreign = cls.foreign_loader
            if is_foreign(pretrained_model_name_or_path, **kwargs):
                return load_foreign(pretrained_model_name_or_path, **kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def validate_inputs(self, images: Any = None, text: Any = None, **kwargs: Any) -> None:
        """Check that there is one image mark per image. The whole batch is named, for a mark lost is hard to find."""
        if text is not None and all(isinstance(sample, str) for sample in text):
            num_marks = [sample.count(self.image_token) for sample in text]
            num_images = 0 if images is None else len(make_flat_list_of_images(images))
            if sum(num_marks) != num_images:
                raise ValueError(
                    f"Got {num_images} images, but {sum(num_marks)} {self.image_token!r} marks in the text "
                    f"({num_marks} per sample); put one mark into the text for each image."
                )
        super().validate_inputs(images=images, text=text, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """The text that takes the place of one image mark. Every image has the same size, so the same tokens."""
        return self.image_token * self.num_image_tokens

    def _get_num_multimodal_tokens(
        self, image_sizes: list[tuple[int, int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Number of placeholder tokens for images of the given `(height, width)` in pixels, for serving engines."""
        if image_sizes is None:
            return MultiModalData()
        return MultiModalData(
            num_image_tokens=[self.num_image_tokens] * len(image_sizes), num_image_patches=[1] * len(image_sizes)
        )


def _on_pillow(image_processor: BaseImageProcessor | None) -> BaseImageProcessor | None:
    """Where torchvision is installed, Transformers prefers it, and its resized pixels differ: take pillow's twin."""
    pillow_class = getattr(transformers, f"{type(image_processor).__name__}Pil", None)
    return image_processor if pillow_class is None else pillow_class(**image_processor.to_dict())


__all__ = ["FlorenceVLProcessor"]
