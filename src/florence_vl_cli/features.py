# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Command of `analysis` that shows features."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from . import options


def features(
    images: Annotated[list[Path], Argument(metavar="IMAGE...", help="Image files, or directories of images.")],
    model: Annotated[
        str, Option(help="Directory or Hub id of a Florence-VL (converted, trained or original) or of a Florence-2.")
    ],
    output: Annotated[
        list[Path], Option(help="An .html file to explore, or a .png to print. Can be repeated, for both.")
    ],
    prompt: options.Prompt = None,
    tokenizer: Annotated[
        str | None,
        Option(
            help="Directory or Hub id of a Florence-2, whose tokenizer reads --prompt. By default, the model's own "
            "or that of microsoft/Florence-2-large."
        ),
    ] = None,
    features: Annotated[
        list[str] | None,
        Option(callback=options.split, help="Which to show, like image,caption. By default, image and all prompts."),
    ] = None,
    per_image: Annotated[
        bool, Option("--per-image", help="Give each image its own colours, instead of one basis for all.")
    ] = False,
    background: Annotated[
        float | None,
        Option(help="First component below which a position is background. By default, automatic.", min=0, max=1),
    ] = None,
    question: Annotated[
        str | None, Option(help="Ask this about each image, and show what each word of the answer attends to.")
    ] = None,
    layer: Annotated[
        int | None, Option(help="Layer of the language model whose attention is shown. By default, the mean.", min=0)
    ] = None,
    batch_size: Annotated[int, Option(help="Number of images per batch.", min=1)] = 8,
    dtype: options.Dtype = None,
    device: options.Device = "auto",
) -> None:
    """Show what the vision encoder sees in images: V and the features of each prompt, as colour maps."""
    if wrong := [path for path in output if path.suffix.lower() not in (".html", ".png") or path.is_dir()]:
        raise typer.BadParameter(f"{wrong[0]} is not an .html or .png file.", param_hint="--output")
    if any(path.suffix.lower() == ".png" for path in output) and find_spec("matplotlib") is None:
        raise ImportError("A PNG requires more packages: pip install 'florence_vl_hf[analysis]'")
    from florence_vl_hf.analysis import load_vision_encoder
    from florence_vl_hf.analysis.page import MAX_DETAILED, build_page, read_images, write_html, write_png
    from florence_vl_hf.conversion import load_pretrained

    # Before the model, which takes long to load.
    rows, prompts = read_images(images), options.parse_prompts(prompt)
    if any(path.suffix.lower() == ".png" for path in output) and len(rows) > MAX_DETAILED:
        raise ValueError(f"A PNG shows at most {MAX_DETAILED} images, got {len(rows)}; write an .html file.")
    for path in output:
        path.parent.mkdir(parents=True, exist_ok=True)
    network, processor = None, None
    if question is None:
        network = load_vision_encoder(model, tokenizer=tokenizer, dtype=options.torch_dtype(dtype), device=device)
    else:
        network, processor = load_pretrained(model, dtype=dtype or "auto", device_map=device)
    page = build_page(
        network,
        rows,
        prompts,
        processor=processor,
        tokenizer=tokenizer,
        features=features,
        per_image=per_image,
        background=background,
        question=question,
        layer=layer,
        batch_size=batch_size,
    )
    title = f"Features of {Path(model).name if Path(model).is_dir() else model}"
    for path in output:
        (write_png if path.suffix.lower() == ".png" else write_html)(page, path, title)
        typer.echo(f"Wrote {path}: {len(page.captions)} maps of {len(rows):,} images.")
