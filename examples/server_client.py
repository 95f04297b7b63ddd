# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Ask a running server about an image: `florence-vl serve MODEL` or vLLM, then `python server_client.py IMAGE`."""

import base64
import mimetypes
import os
from pathlib import Path
from typing import Annotated

import typer
from openai import OpenAI, OpenAIError


def main(
    image: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    question: str = "What is shown in the image?",
    server: Annotated[str, typer.Option(help="URL of OpenAI's API.")] = "http://127.0.0.1:8000/v1",
    max_tokens: int = 256,
) -> None:
    # `florence-vl serve` has no keys; vLLM has one with `--api-key`.
    client = OpenAI(base_url=server, api_key=os.environ.get("OPENAI_API_KEY", "none"))
    media_type = mimetypes.guess_type(image)[0] or "image/png"
    data = base64.b64encode(image.read_bytes()).decode()
    try:
        stream = client.chat.completions.create(
            model=client.models.list().data[0].id,
            messages=[
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": f"data:{media_type};base64,{data}"}},
                        {"type": "text", "text": question},
                    ],
                }
            ],
            max_tokens=max_tokens,
            temperature=0,
            stream=True,
        )
        for chunk in stream:
            typer.echo(chunk.choices[0].delta.content or "", nl=False)
        typer.echo()
    except OpenAIError as error:
        raise SystemExit(f"{server}: {error}") from error


if __name__ == "__main__":
    typer.run(main)
