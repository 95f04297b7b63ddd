# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Images of all modes, sizes and formats, damaged in all ways: each is pixel values of the right shape, or broken."""

import io
import os
import struct
import zlib
from pathlib import Path
from random import Random

import torch
from PIL import Image

from florence_vl_hf import FlorenceVLProcessor
from florence_vl_hf.training import FlorenceVLCollator, SampleError

from .harness import MAX_SECONDS, time_limit


FORMATS = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16"),
    "JPEG": ("L", "RGB", "CMYK", "YCbCr"),
    "GIF": ("1", "L", "P", "RGB"),
    "WEBP": ("RGB", "RGBA"),
    "BMP": ("1", "L", "P", "RGB"),
    "TIFF": ("1", "L", "P", "RGB", "RGBA", "CMYK", "I", "F", "I;16", "LAB", "YCbCr"),
    "PPM": ("1", "L", "RGB"),
    "TGA": ("L", "P", "RGB", "RGBA"),
    "ICO": ("RGB", "RGBA"),
}


def check(random: Random, directory: Path, processor: FlorenceVLProcessor) -> str:
    file = directory / random.choice(["a.png", "b.jpg", "c", "ü ß.gif", "d.txt"])
    file.write_bytes(_content(random))
    sample = {
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "It."}],
        "image": str(file),
    }
    try:
        with time_limit(MAX_SECONDS):
            batch = FlorenceVLCollator(processor, on_error="raise")([sample])
    except SampleError as error:
        return "" if "\n" not in str(error) and len(str(error)) < 1000 else f"unclear message: {str(error)[:300]}"
    pixel_values = batch["pixel_values"]
    size = processor.image_processor.size
    if tuple(pixel_values.shape) != (1, 3, size["height"], size["width"]):
        return f"pixel values of shape {tuple(pixel_values.shape)}"
    return "" if bool(torch.isfinite(pixel_values).all()) else "pixel values that are not finite"


def _content(random: Random) -> bytes:
    kind = random.randrange(20)
    if kind == 0:
        return random.randbytes(random.randrange(200))
    if kind == 1:
        return _bomb(random)
    content = _image(random)
    if kind in (2, 3, 4):
        return content[: random.randrange(len(content) + 1)]
    if kind in (5, 6, 7):
        damaged = bytearray(content)
        for _ in range(random.choice([1, 3, 30])):
            damaged[random.randrange(len(damaged))] = random.randrange(256)
        return bytes(damaged)
    if kind == 8:
        cut = random.randrange(len(content))
        return content[:cut] + random.randbytes(20) + content[cut:]
    return content


def _size(random: Random) -> tuple[int, int]:
    if random.random() < 0.1:
        return random.choice([(1, 1), (1, 20_000), (20_000, 1), (1, 3000), (3000, 1), (2, 65_000)])
    return int(2 ** random.uniform(0, 9)), int(2 ** random.uniform(0, 9))


def _image(random: Random) -> bytes:
    image_format = random.choice(list(FORMATS))
    mode, size = random.choice(FORMATS[image_format]), _size(random)
    if image_format == "ICO":
        size = (min(size[0], 256), min(size[1], 256))
    if image_format == "WEBP":
        size = (min(size[0], 16_000), min(size[1], 16_000))
    image = Image.effect_noise(size, 80).convert("RGB") if min(size) > 1 else Image.new("RGB", size, "orange")
    image = image.convert("L").convert(mode) if mode in ("I", "F", "I;16") else _convert(image, mode)
    settings: dict = {}
    if image_format in ("JPEG", "PNG", "WEBP") and random.random() < 0.4:
        settings["exif"] = _exif(random)
    if image_format in ("PNG", "GIF") and random.random() < 0.2:
        settings["transparency"] = 0
    if image_format in ("GIF", "WEBP", "PNG", "TIFF") and random.random() < 0.3:
        settings |= {"save_all": True, "append_images": [image] * random.randrange(1, 4)}
    buffer = io.BytesIO()
    try:
        image.save(buffer, image_format, **settings)
    except (OSError, ValueError, TypeError):  # what this format or Pillow cannot write
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if mode == "LAB":
        return Image.merge("LAB", image.split())
    return image.convert(mode)


def _exif(random: Random) -> bytes:
    if random.random() < 0.2:
        return random.randbytes(40)
    exif = Image.Exif()
    exif[0x0112] = random.choice([1, 2, 3, 4, 5, 6, 7, 8, 0, 9, 65535])
    return exif.tobytes()


def _bomb(random: Random) -> bytes:
    """A PNG of a few bytes that says it has up to 2**31 pixels in a line, or that inflates to gigabytes."""
    size = random.choice([(100_000, 100_000), (2**31 - 1, 1), (1, 2**31 - 1), (30_000, 30_000), (20_000, 1), (0, 0)])
    lines = zlib.compress(bytes(min(10**6, size[0] + 1)) * random.choice([1, 50]), 9)

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", *size, random.choice([1, 8, 16]), random.choice([0, 2, 3]), 0, 0, 0)
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**7))) if random.random() < 0.3 else b""
    end = os.linesep.encode() if random.random() < 0.2 else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + text + chunk(b"IDAT", lines) + chunk(b"IEND", b"") + end
