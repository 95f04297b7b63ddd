# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License. You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Processor of Florence-VL: images and text with image tokens become the inputs of the model."""

from typing import Any

import transformers
from transformers import BaseImageProcessor, PreTrainedTokenizerBase
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import MultiModalData, ProcessorMixin
from transformers.utils import auto_docstring

from .chat_templates import load_chat_template


IMAGE_TOKEN = "<image>"


@auto_docstring(
    custom_intro="""
    Wraps an image processor and a tokenizer into one processor, which replaces each image token in the text by as
    many as the model has features per image.
    """
)
class FlorenceVLProcessor(ProcessorMixin):
    def __init__(
        self,
        image_processor: BaseImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        num_image_tokens: int = 577,
        chat_template: str | None = None,
        image_token: str = IMAGE_TOKEN,
    ) -> None:
        r"""
        num_image_tokens (`int`, *optional*, defaults to 577):
            Number of tokens per image, `num_image_tokens` of the model's configuration.
        image_token (`str`, *optional*, defaults to `"<image>"`):
            Placeholder of one image in the text. A tokenizer's own `image_token` takes precedence.
        """
        self.num_image_tokens = num_image_tokens
        self.image_token = getattr(tokenizer, "image_token", None) or image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        if self.image_token_id in (None, tokenizer.unk_token_id):
            raise ValueError(
                f"The tokenizer has no token {self.image_token!r}; add it as a special token, or give the tokenizer's "
                f"image token as `image_token`."
            )
        if getattr(tokenizer, "image_token", None) is None:
            # Transformers, its pipelines and TRL read it there. The tokenizer saves and loads it.
            tokenizer.SPECIAL_TOKENS_ATTRIBUTES = [*tokenizer.SPECIAL_TOKENS_ATTRIBUTES, "image_token"]
            tokenizer.image_token = self.image_token
        super().__init__(_on_pillow(image_processor), tokenizer, chat_template=chat_template)

    def apply_chat_template(  # type: ignore[override]  # the other arguments pass through
        self, conversation: Any, chat_template: str | None = None, **kwargs: Any
    ) -> Any:
        """As in Transformers; `chat_template` may also be the name of a template of this package, such as `plain`."""
        is_own = isinstance(self.chat_template, dict) and chat_template in self.chat_template
        # Text without a brace is a name: as a template it would be the whole prompt.
        if chat_template is not None and "{" not in chat_template and not is_own:
            chat_template = load_chat_template(chat_template, self.tokenizer, self.image_token)
        return super().apply_chat_template(conversation, chat_template=chat_template, **kwargs)

    @classmethod
    def _get_arguments_from_pretrained(cls, *args: Any, **kwargs: Any) -> list[Any]:
        # Loading the tokenizer loads the configuration, which gets the same `kwargs` but derives this number.
        kwargs.pop("num_image_tokens", None)
        return super()._get_arguments_from_pretrained(*args, **kwargs)

    def prepare_inputs_layout(self, images: Any = None, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """
        As in Transformers, with samples without images in lists of each sample's images: `[]`, or `None` as in TRL.

        A batch whose samples all have no images, such as `[[]]`, has no `pixel_values`.
        """
        if isinstance(images, (list, tuple)):
            images = [[] if of_sample is None else of_sample for of_sample in images]
        images, *other_inputs = super().prepare_inputs_layout(images, *args, **kwargs)
        flat_images: Any = [] if images is None else make_flat_list_of_images(images)
        return (images if len(flat_images) > 0 else None, *other_inputs)

    def validate_inputs(  # type: ignore[override]  # the other arguments pass through
        self, images: Any = None, text: Any = None, **kwargs: Any
    ) -> None:
        """
        Check that there is one image token per image, in each sample if `images` has one list per sample.

        The error lists the whole batch, which helps to find the sample.
        """
        if text is not None and all(isinstance(sample, str) for sample in text):
            num_tokens = [sample.count(self.image_token) for sample in text]
            flat_images: Any = [] if images is None else make_flat_list_of_images(images)
            per_sample = ""
            if isinstance(images, (list, tuple)) and all(isinstance(sample, (list, tuple)) for sample in images):
                num_images = [len(sample) for sample in images]
                per_sample = f" ({num_images} per sample)"
                matches = num_images == num_tokens
            else:
                matches = len(flat_images) == sum(num_tokens)
            if not matches:
                raise ValueError(
                    f"Got {len(flat_images)} images{per_sample} but {sum(num_tokens)} {self.image_token!r} tokens "
                    f"in the text ({num_tokens} per sample). The number of image tokens in the prompts should be the "
                    f"same as the number of images: add one {self.image_token!r} per image."
                )
        super().validate_inputs(images=images, text=text, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """Text that replaces one image token. All images have the same size, so the same number of tokens."""
        return self.image_token * self.num_image_tokens

    def _get_num_multimodal_tokens(
        self, image_sizes: list[tuple[int, int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Number of image tokens for images of the given `(height, width)` in pixels, for serving engines."""
        if image_sizes is None:
            return MultiModalData()
        return MultiModalData(
            num_image_tokens=[self.num_image_tokens] * len(image_sizes), num_image_patches=[1] * len(image_sizes)
        )


def _on_pillow(image_processor: BaseImageProcessor) -> BaseImageProcessor:
    """Replace an image processor by its Pillow version: where torchvision is installed, resized pixels differ."""
    pillow_class = getattr(transformers, f"{type(image_processor).__name__}Pil", None)
    return image_processor if pillow_class is None else pillow_class(**image_processor.to_dict())


# `save_pretrained` copies this module beside processor_config.json, for `trust_remote_code=True`.
FlorenceVLProcessor.register_for_auto_class()

__all__ = ["IMAGE_TOKEN", "FlorenceVLProcessor"]
