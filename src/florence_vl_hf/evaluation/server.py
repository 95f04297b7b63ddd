# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Answers of a server with OpenAI's API, such as vLLM's."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import datasets
import openai

from ..processing.images import data_url
from ..processing.text import to_utf8
from ..training.samples import SampleError
from .questions import message_text, open_question


# Of one request, before the run is given up: a server that restarts has minutes to do so.
MAX_RETRIES = 8
# What servers answer to a request that is too long, or that they cannot process.
REFUSALS = (openai.BadRequestError, openai.UnprocessableEntityError)


def request_answers(
    samples: datasets.Dataset,
    indices: Sequence[int],
    server: str,
    model: str,
    max_new_tokens: int,
    num_requests: int,
) -> Iterator[tuple[int, str | SampleError]]:
    """
    Request greedy answers from a server. The API key is that of the environment variable `OPENAI_API_KEY`, if any.

    Args:
        samples (`datasets.Dataset`): Samples of `load_questions`.
        indices (`Sequence[int]`): Which samples to answer.
        server (`str`): URL of the API, such as `http://localhost:8000/v1`.
        model (`str`): The server's name of the model.
        num_requests (`int`): Number of requests at the same time.

    Yields:
        `tuple[int, str | SampleError]`: As soon as it is known, the index of a sample and its answer, or what is wrong
        with it.

    Raises:
        ValueError: If `server` is not a URL.
        ConnectionError: If the server does not answer, or not as a server with this API.
    """
    if not server.startswith(("http://", "https://")):
        raise ValueError(f"Got the server {server!r}, expected a URL such as http://localhost:8000/v1.")

    def request(index: int) -> tuple[int, str | SampleError]:
        try:
            completion = client.chat.completions.create(
                model=model, messages=_to_openai(samples[index]), max_tokens=max_new_tokens, temperature=0
            )
            return index, to_utf8(completion.choices[0].message.content or "").strip()
        except SampleError as error:
            return index, error
        except REFUSALS as error:
            return index, SampleError(f"The server refuses it: {error}")

    api_key = None if "OPENAI_API_KEY" in os.environ else "none"
    with (
        openai.OpenAI(base_url=server, api_key=api_key, max_retries=MAX_RETRIES) as client,
        ThreadPoolExecutor(num_requests) as pool,
    ):
        try:
            for future in as_completed([pool.submit(request, index) for index in indices]):
                yield future.result()
        except openai.OpenAIError as error:
            raise ConnectionError(
                f"{server} does not answer for the model {model!r} ({error}); start the server, or correct its URL or "
                f"the name of the model."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _to_openai(sample: dict[str, Any]) -> Any:
    """Convert a sample to messages of the API, with images as data URLs."""
    return [
        {
            "role": message["role"],
            "content": [_to_part(item) for item in message["content"]]
            if message["role"] == "user"
            else message_text(message),
        }
        for message in open_question(sample)
    ]


def _to_part(item: dict[str, Any]) -> dict[str, Any]:
    if item["type"] == "text":
        return {"type": "text", "text": item["text"]}
    return {"type": "image_url", "image_url": {"url": data_url(item["image"], "PNG", compress_level=1)}}


__all__ = ["request_answers"]
