# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Read the text of a document, an image or a TIFF of several pages: `python document_ocr.py MODEL DOCUMENT`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image, ImageOps, ImageSequence

from florence_vl_hf.conversion import load_pretrained


def cut(page: Image.Image, min_height: int) -> Iterator[Image.Image]:
    """Cut a page into strips, at most as tall as wide, below the emptiest rows of pixels: between lines of text."""
    contrast = np.asarray(page.convert("L"), dtype=float).std(axis=1)  # of each row
    top, height = 0, max(page.width, min_height)
    while page.height - top > height:
        lower_half = contrast[top + height // 2 : top + height]
        bottom = top + height - int(lower_half[::-1].argmin())
        yield page.crop((0, top, page.width, bottom))
        top = bottom
    yield page.crop((0, top, page.width, page.height))


def main(
    model: Annotated[str, typer.Argument(help="Directory or Hub id, such as jiuhai/florence-vl-8b-sft.")],
    document: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    output: Annotated[Path, typer.Option(help="File of the text.")] = Path("document.txt"),
    question: str = "Write down all text in the image, line by line.",
    max_new_tokens: int = 1024,
) -> None:
    pages = Image.open(document)
    network, processor = load_pretrained(model, dtype="auto", device_map="auto")
    network.eval()
    texts = []
    for page in ImageSequence.Iterator(pages):
        # An image is padded to a square and resized to 768 x 768 pixels, where small text of a tall page is lost.
        # In strips it is larger. Lines that are still too small need a crop of their own, such as of a column.
        for strip in cut(ImageOps.exif_transpose(page).convert("RGB"), network.config.image_size):
            content = [{"type": "image", "image": strip}, {"type": "text", "text": question}]
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": content}],
                tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt",
            ).to(network.device, dtype=network.dtype)  # fmt: skip
            output_ids = network.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            answer_ids = output_ids[0, inputs["input_ids"].shape[1] :]
            texts.append(processor.decode(answer_ids, skip_special_tokens=True).strip())
            typer.echo(texts[-1])
    output.write_text("\n".join(texts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
