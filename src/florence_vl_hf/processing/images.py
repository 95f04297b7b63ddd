# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Reading of images from anybody, of which the header is checked first."""

from PIL import Image
from transformers.image_utils import load_image


# The longest side of an image, in pixels: far longer than of any in real data. Its square is built where images are
# padded, which costs memory and time even if the file has a few hundred bytes.
MAX_IMAGE_SIDE = 12_000


def read_pixels(image: Image.Image, max_side: int = MAX_IMAGE_SIDE) -> Image.Image:
    """
    Read an opened image completely, rotated upright and in RGB as the processor reads a path.

    Transparency is dropped, as in the original: of an image that has it, the processor's pixels differ by release.

    Raises:
        ValueError: If a side has more than `max_side` pixels, or it is a program. Pillow's decoders raise many types.
    """
    # Up to here, Pillow has read only the header.
    if max(image.size) > max_side:
        raise ValueError(f"it has {image.width} x {image.height} pixels, more than `max_image_side: {max_side}`")
    if image.format == "EPS":
        raise ValueError("it is an EPS file, which is a program")
    return load_image(image)
