# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Models and processors with random weights: Florence-VL, the original's way of computing it, and a LLaVA."""

import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import ByteLevelBPETokenizer
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Florence2Config,
    Florence2ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from florence_vl_hf import FlorenceVLConfig, FlorenceVLForConditionalGeneration, FlorenceVLProcessor
from florence_vl_hf.conversion.original_config import PUBLIC_IMAGES
from florence_vl_hf.modeling.configuration_florence_vl import LLAMA_3_1_8B
from florence_vl_hf.processing import IMAGE_TOKEN, load_chat_template


ROOT = Path(__file__).parent.parent
TINY_TEXT = {
    "model_type": "llama",
    "vocab_size": 32064,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
# By name, as on the command line: Llama-3.2-1B, Phi-3.5-mini and Llama-3.1-8B, and one that fits everywhere.
TEXT_MODELS: dict[str, dict[str, Any]] = {
    "tiny": TINY_TEXT,
    "1b": {**LLAMA_3_1_8B, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
    "3b": {"model_type": "phi3", "vocab_size": 32064},
    "8b": LLAMA_3_1_8B,
}
SMALL_CONFIG: dict[str, Any] = {
    "vision_config": {
        "vision_config": {
            "embed_dim": [16, 16, 32, 32],
            "num_heads": [2, 2, 4, 4],
            "num_groups": [2, 2, 4, 4],
            "depths": [1, 1, 2, 1],
            "projection_dim": 16,
            "window_size": 4,
        },
        "text_config": {
            "model_type": "bart",
            "vocab_size": 51289,
            "d_model": 16,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "decoder_layers": 1,
            "decoder_attention_heads": 2,
            "decoder_ffn_dim": 32,
            "max_position_embeddings": 1024,
        },
    },
    # With a size of heads that vLLM's attention on the CPU supports.
    "text_config": {
        **TINY_TEXT,
        "vocab_size": 1024,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "head_dim": 64,
    },
    "image_size": 64,
}
CLIP_LARGE_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
SMALL_CLIP = {**CLIP_LARGE_336, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "image_size": 28}


@dataclass(frozen=True)
class Setup:
    """
    Settings of a run, and the models that its parts share.

    Args:
        text (`str`): One of `TEXT_MODELS`.
        small (`bool`): Whether to make all models tiny, to see that each part runs.
        repeats (`int`): Number of rounds of each measurement.
        device (`torch.device`): Where models compute.
        dtype (`torch.dtype`): Dtype of their weights.
        max_batch (`int`): Larger batches of images are left out.
    """

    text: str
    small: bool
    repeats: int
    device: torch.device
    dtype: torch.dtype
    max_batch: int

    def batch_sizes(self, *sizes: int) -> list[int]:
        """Leave out the sizes that are too large for this run."""
        return [size for size in sizes if size <= self.max_batch]

    def check_equal(self, ours: torch.Tensor, original: torch.Tensor) -> None:
        """Raise an `AssertionError` where the two differ by more than a fraction of the largest value."""
        largest = original.abs().max()
        tolerance = 2e-5 if self.dtype is torch.float32 else 5e-2
        assert_close(ours / largest, original / largest, rtol=0, atol=tolerance)

    @cached_property
    def config(self) -> FlorenceVLConfig:
        settings = SMALL_CONFIG if self.small else {"text_config": TEXT_MODELS[self.text]}
        token_ids = {f"{name}_token_id": getattr(self.tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        text_config = {**settings["text_config"], **token_ids}
        image_token_id = self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        return FlorenceVLConfig(**{**settings, "text_config": text_config, "image_token_id": image_token_id})

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """A byte-level BPE tokenizer, trained on the project's own text."""
        bpe = ByteLevelBPETokenizer()
        special_tokens = ["<s>", "</s>", "<pad>", IMAGE_TOKEN]
        bpe.train(
            [str(ROOT / "README.md"), str(ROOT / "LICENSE")],
            vocab_size=1000,
            special_tokens=special_tokens,
            show_progress=False,
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=bpe._tokenizer,
            bos_token="<s>",
            eos_token="</s>",
            pad_token="<pad>",
            extra_special_tokens=[IMAGE_TOKEN],
            padding_side="left",
        )

    @cached_property
    def model(self) -> FlorenceVLForConditionalGeneration:
        torch.manual_seed(0)
        model = FlorenceVLForConditionalGeneration._from_config(self.config, dtype=self.dtype)
        return model.to(self.device).eval()

    @cached_property
    def processor(self) -> FlorenceVLProcessor:
        size = {"height": self.config.image_size, "width": self.config.image_size}
        images = {**PUBLIC_IMAGES, "size": size, "crop_size": size, "do_center_crop": False, "do_pad": True}
        return FlorenceVLProcessor(
            LlavaImageProcessorPil(**images),
            copy.deepcopy(self.tokenizer),
            self.config.num_image_tokens,
            self.template,
        )

    @cached_property
    def template(self) -> str:
        return load_chat_template("vicuna", self.tokenizer)

    @cached_property
    def original(self) -> "Original":
        return Original(self.model)

    @cached_property
    def peer(self) -> LlavaForConditionalGeneration:
        """LLaVA-1.5 with CLIP-L/14 at 336 x 336, and the same language model in the same memory."""
        text_config = copy.deepcopy(self.config.text_config)
        text_config.num_hidden_layers = 1  # replaced below
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(**(SMALL_CLIP if self.small else CLIP_LARGE_336)).to_dict(),
            text_config=text_config,
            image_token_index=self.config.image_token_id,
        )
        peer = LlavaForConditionalGeneration._from_config(config, dtype=self.dtype)
        peer.model.language_model = self.model.model.language_model
        peer.lm_head = self.model.lm_head
        peer.config.text_config = self.config.text_config
        return peer.to(self.device).eval()

    @cached_property
    def peer_processor(self) -> LlavaProcessor:
        clip = self.peer.config.vision_config
        return self.make_peer_processor(clip.image_size, clip.patch_size)

    def make_peer_processor(self, image_size: int, patch_size: int) -> LlavaProcessor:
        size = {"height": image_size, "width": image_size}
        return LlavaProcessor(
            CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=size),
            copy.deepcopy(self.tokenizer),
            patch_size=patch_size,
            vision_feature_select_strategy="default",
            chat_template=self.template,
            num_additional_image_tokens=1,
        )

    @cached_property
    def image(self) -> Image.Image:
        """A photograph's size and smoothness, in random colours."""
        coarse = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        return Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC)

    def pixel_values(self, num_images: int, image_size: int | None = None) -> torch.Tensor:
        """Random pixels, of shape `(num_images, 3, image_size, image_size)`, by default as ours expects them."""
        size = image_size or self.config.image_size
        generator = torch.Generator().manual_seed(0)
        return torch.randn(num_images, 3, size, size, generator=generator).to(self.device, self.dtype)

    def messages(self, num_images: int = 1, num_words: int = 12, answer: str | None = None) -> list[dict[str, Any]]:
        """Return a question about images, with or without an answer."""
        images = [{"type": "image", "image": self.image}] * num_images
        question = {"type": "text", "text": " ".join(["word"] * num_words)}
        turns = [{"role": "user", "content": [*images, question]}]
        if answer is not None:
            turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return turns

    def inputs(self, processor: Any, conversations: list[list[dict[str, Any]]]) -> dict[str, torch.Tensor]:
        """Prepare conversations for `generate`."""
        inputs = processor.apply_chat_template(
            conversations,
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            processor_kwargs={"padding": True, "return_tensors": "pt"},
        )
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.dtype)
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}


class Original:
    """
    The original's computation, from classes of Transformers, with the weights of `model` in the same memory.

    One image at a time, DaViT once and then `generate(max_new_tokens=1)` of a whole Florence-2 for each prompt, whose
    encoder's last hidden states are kept. The language model computes float32 logits of all positions.
    """

    def __init__(self, model: FlorenceVLForConditionalGeneration) -> None:
        self.ours = model
        config = Florence2Config(**model.config.vision_config.to_dict())
        config.image_token_id = config.text_config.vocab_size - 1  # no prompt has it
        tower = model.model.vision_tower
        self.florence = Florence2ForConditionalGeneration._from_config(config, dtype=model.dtype)
        self.florence.to(model.device).eval()
        parts = {
            "vision_tower": tower.backbone,
            "multi_modal_projector": tower.image_projector,
            "language_model.encoder": tower.encoder,
        }
        for name, part in parts.items():
            self.florence.model.get_submodule(name).load_state_dict(part.state_dict(), assign=True)
        self.florence.model.language_model.shared.weight = tower.encoder.embed_tokens.weight
        self.florence.tie_weights()
        self.prompts = [
            torch.tensor([model.config.prompt_token_ids[name]], device=model.device)
            for name in model.config.fusion_prompts
        ]

    def image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Projected features, of shape `(num_images, num_image_tokens, text_hidden_size)`."""
        fused = torch.cat([self._fused_features_of_one(image) for image in pixel_values.split(1)])
        return self.ours.model.multi_modal_projector(fused)

    @torch.no_grad()
    def _fused_features_of_one(self, pixel_values: torch.Tensor) -> torch.Tensor:
        image_feature = self.florence.get_image_features(pixel_values, return_dict=True).pooler_output
        num_tokens = image_feature.shape[1]
        image_ids = torch.full((1, num_tokens), self.florence.config.image_token_id, device=pixel_values.device)
        features = [image_feature]
        for prompt in self.prompts:
            input_ids = torch.cat([image_ids, prompt], dim=1)
            generated = self.florence.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=image_feature)},
                max_new_tokens=1,
                do_sample=False,
                num_beams=1,
                return_dict_in_generate=True,
                output_hidden_states=True,
            )
            features.append(generated.encoder_hidden_states[-1][:, :num_tokens])
        return torch.cat(features, dim=-1)

    def embed(self, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        """Embeddings of text and images, of shape `(batch_size, sequence_length, text_hidden_size)`."""
        embeds = self.ours.get_input_embeddings()(input_ids)
        is_image = (input_ids == self.ours.config.image_token_id).unsqueeze(-1)
        return embeds.masked_scatter(is_image, self.image_features(pixel_values).flatten(0, 1))

    def logits(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        """Float32 logits of all positions, of shape `(batch_size, sequence_length, vocab_size)`."""
        embeds = self.embed(input_ids, pixel_values)
        hidden_states = self.ours.model.language_model(inputs_embeds=embeds, attention_mask=attention_mask)[0]
        return self.ours.lm_head(hidden_states).float()


def causal_lm(model: FlorenceVLForConditionalGeneration) -> PreTrainedModel:
    """Return Transformers' own causal language model, with the weights of `model` in the same memory."""
    with torch.device("meta"):
        language_model = AutoModelForCausalLM.from_config(model.config.text_config, dtype=model.dtype)
    language_model.model = model.model.language_model
    language_model.lm_head = model.lm_head
    return language_model.eval()
