# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""The processor, and the encoding of images."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from math import isqrt
from typing import Any

import torch
from PIL import Image
from torch.testing import assert_close
from transformers import CLIPImageProcessorPil, LlavaProcessor

from florence_vl_hf.conversion.original_config import PUBLIC_IMAGES
from florence_vl_hf.training.collator import IGNORED_LABEL, FlorenceVLCollator

from .measuring import Row, compare, elapsed, num_bytes, record_products
from .models import Setup


ANSWER = "It is an image. " * 8


def processor(setup: Setup) -> Iterator[Row]:
    """Prepare images, and samples with a template and labels."""
    num_images = 8
    images = [setup.image] * num_images
    peer = setup.peer_processor.image_processor
    size = setup.config.image_size
    # As many pixels and image tokens as ours.
    peer_of_same_size = setup.make_peer_processor(size, size // isqrt(setup.config.num_image_tokens))
    square = {"height": size, "width": size}
    clip = CLIPImageProcessorPil(**{**PUBLIC_IMAGES, "size": square, "do_center_crop": False})

    def prepare() -> torch.Tensor:
        return setup.processor.image_processor(images, return_tensors="pt").pixel_values

    def prepare_original() -> torch.Tensor:
        # One image at a time, on a square canvas of the mean colour.
        prepared = []
        for image in images:
            side = max(image.size)
            canvas = Image.new("RGB", (side, side), tuple(int(mean * 255) for mean in clip.image_mean))
            canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            prepared.append(clip(canvas, return_tensors="pt").pixel_values)
        return torch.cat(prepared)

    def resize() -> None:
        for image in images:
            image.resize((size, size), Image.Resampling.BICUBIC)

    yield from compare(
        "processor: images",
        prepare,
        {
            "original": prepare_original,
            "peer": lambda: peer(images, return_tensors="pt"),
            "peer, same size": lambda: peer_of_same_size.image_processor(images, return_tensors="pt"),
            "limit": resize,
        },
        setup.repeats,
        "images/s",
        num_images,
        check_original=assert_close,
    )

    collator = FlorenceVLCollator(setup.processor, on_error="raise")
    conversation = setup.messages(answer=ANSWER)
    without_image = [
        {
            **turn,
            "content": [{name: value for name, value in item.items() if name != "image"} for item in turn["content"]],
        }
        for turn in conversation
    ]
    samples = [{"messages": without_image, "images": [image]} for image in images]

    def prepare_peer(peer_processor: LlavaProcessor = setup.peer_processor) -> dict[str, torch.Tensor]:
        inputs = peer_processor.apply_chat_template(
            [conversation] * num_images,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            processor_kwargs={"padding": True, "return_tensors": "pt"},
        )
        is_answer = torch.as_tensor(inputs["assistant_masks"])
        return {**inputs, "labels": inputs["input_ids"].masked_fill(is_answer == 0, IGNORED_LABEL)}

    yield from compare(
        "processor: samples with template and labels",
        lambda: collator(samples),
        {"peer": prepare_peer, "peer, same size": lambda: prepare_peer(peer_of_same_size)},
        setup.repeats,
        "samples/s",
        num_images,
    )


def vision(setup: Setup) -> Iterator[Row]:
    """Encode images: vision tower, fusion and projector."""
    to_compile = replace(setup)  # the same weights, in another model
    if setup.small:
        options = {"backend": "aot_eager"}  # inductor takes as long as for large models
    else:
        options = {"mode": "reduce-overhead" if setup.device.type == "cuda" else "default"}
    to_compile.model.model.vision_tower.compile(fullgraph=True, **options)
    for num_images in setup.batch_sizes(1, 8):
        pixel_values = setup.pixel_values(num_images)
        peer_pixel_values = setup.pixel_values(num_images, setup.peer.config.vision_config.image_size)

        @torch.no_grad()
        def ours(pixel_values: torch.Tensor = pixel_values, model: Any = setup.model) -> torch.Tensor:
            return torch.stack(model.get_image_features(pixel_values, return_dict=True).pooler_output)

        @torch.no_grad()
        def peer(pixel_values: torch.Tensor = peer_pixel_values) -> Any:
            return setup.peer.get_image_features(pixel_values, return_dict=True)

        @torch.no_grad()
        def original(pixel_values: torch.Tensor = pixel_values) -> torch.Tensor:
            return setup.original.image_features(pixel_values)

        products = record_products(setup.model, ours)
        details = {
            "flops": products.flops,
            "flops of peer": record_products(setup.peer, peer).flops,
            "bytes of the tower": num_bytes(setup.model.model.vision_tower),
            "bytes of the original's tower": num_bytes(setup.original.florence),
        }
        yield from compare(
            f"vision, batch {num_images}",
            ours,
            {"original": original, "peer": peer, "limit": products.replay()},
            setup.repeats,
            "images/s",
            num_images,
            check_original=setup.check_equal,
            details=details,
        )

        compiled = partial(ours, model=to_compile.model)
        # With an empty cache, this compiles.
        first_run = elapsed(compiled)
        setup.check_equal(compiled(), ours())
        yield from compare(
            f"vision, compiled, batch {num_images}",
            compiled,
            {"eager": ours, "limit": products.replay()},
            setup.repeats,
            "images/s",
            num_images,
            with_memory=False,
            details={"seconds of the first run": first_run},
        )
