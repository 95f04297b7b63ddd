# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Reading of images from anybody, of which the header is checked first, and writing of images into texts."""

import base64
from io import BytesIO
from pathlib import Path
from typing import Any

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


def find_images(directory: Path) -> list[Path]:
    """Return the files in a directory and its subdirectories that are images by their names, sorted."""
    suffixes = Image.registered_extensions()
    return [file for file in sorted(directory.rglob("*")) if file.suffix.lower() in suffixes and file.is_file()]


def data_url(image: Image.Image, image_format: str, **options: Any) -> str:
    """Encode an image as a data URL."""
    file = BytesIO()
    image.save(file, image_format, **options)
    return f"data:image/{image_format.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
