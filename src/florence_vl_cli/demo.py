# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Command of `serving`."""

from importlib.util import find_spec
from typing import Annotated

import typer
from typer import Argument, Option

from .options import Device, MaxNewTokens, Model
from .serve import listen


def demo(
    model: Model,
    images: Annotated[list[str] | None, Argument(help="Images that the page offers as examples, as paths.")] = None,
    host: Annotated[str, Option(help="Address to listen on. By default, of this machine only.")] = "127.0.0.1",
    port: Annotated[int, Option(help="Port to listen on.", min=1, max=65535)] = 7860,
    share: Annotated[
        bool, Option("--share", help="Also make the page public, through a server of Gradio, for a week.")
    ] = False,
    max_new_tokens: MaxNewTokens = 512,
    device: Device = "auto",
) -> None:
    """Chat about images on a web page, which also shows what the vision encoder computes."""
    if find_spec("gradio") is None:
        raise ImportError("The demo requires more packages; run `pip install 'florence_vl_hf[demo]'`.")
    from florence_vl_hf.conversion import load_pretrained
    from florence_vl_hf.serving import load_image
    from florence_vl_hf.serving.demo import LAUNCH, build_demo

    # Before the model, which takes long to load.
    for image in images or []:
        load_image(image)
    listen(host, port).close()
    network, processor = load_pretrained(model, dtype="auto", device_map=device)
    page = build_demo(model, network, processor, images or [], max_new_tokens)
    page.launch(**LAUNCH, server_name=host, server_port=port, share=share, prevent_thread_lock=True)
    typer.echo(f"Open {page.local_url} in a browser. Ctrl-C stops.")
    page.block_thread()
