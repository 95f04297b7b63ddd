# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Command of `serving`."""

import socket
from contextlib import suppress
from typing import Annotated

import typer
from typer import Option

from .options import Device, LoadIn4bit, LoadIn8bit, Model, quantization


def serve(
    model: Model,
    host: Annotated[str, Option(help="Address to listen on. By default, of this machine only.")] = "127.0.0.1",
    port: Annotated[int, Option(help="Port to listen on; 0 for any that is free.", min=0, max=65535)] = 8000,
    device: Device = "auto",
    load_in_4bit: LoadIn4bit = False,
    load_in_8bit: LoadIn8bit = False,
    max_request_size: Annotated[
        int, Option(help="Maximum size of a request, and of each image that it names, in MB.", min=1)
    ] = 64,
    allow_private_urls: Annotated[
        bool, Option("--allow-private-urls", help="Also load images from private addresses, such as this machine's.")
    ] = False,
) -> None:
    """Serve a model with the OpenAI-compatible API of `transformers serve`."""
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ImportError("The server requires more packages; run `pip install 'florence_vl_hf[serving]'`.")
    import uvicorn

    from florence_vl_hf.conversion import load_pretrained
    from florence_vl_hf.serving.server import build_app

    quantization_config = quantization(load_in_4bit, load_in_8bit)
    # Before the model, which takes long to load. Requests wait for it.
    with listen(host, port) as listener:
        network, processor = load_pretrained(
            model, dtype="auto", device_map=device, quantization_config=quantization_config
        )
        app = build_app(model, network, processor, max_request_size * 10**6, allow_private_urls)
        address = f"[{host}]" if ":" in host else host
        typer.echo(f"Serving {model} at http://{address}:{listener.getsockname()[1]}/v1. Ctrl-C stops.")
        with suppress(KeyboardInterrupt):
            uvicorn.Server(uvicorn.Config(app)).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens, or raise an `OSError` that says what to do."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise OSError(
            f"Cannot listen on {host}:{port} ({error.strerror}); choose another --port or --host."
        ) from error
