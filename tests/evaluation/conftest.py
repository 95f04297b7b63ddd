# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""A model, samples to answer, and a server with OpenAI's API."""

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from florence_vl_hf.conversion import convert

from ..conftest import FIXTURES, Golden, llava_sample


LLAMA = Golden(FIXTURES / "llama-small")


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model in float32, whose answers end after different numbers of tokens."""
    output = tmp_path_factory.mktemp("evaluation") / "model"
    convert(LLAMA.checkpoint, output, vision_tower=LLAMA.vision_tower, dtype=torch.float32)
    settings = json.loads((output / "generation_config.json").read_text())
    settings |= {"eos_token_id": [2, *range(300, 340)], "do_sample": True, "temperature": 2.0, "max_length": 4}
    (output / "generation_config.json").write_text(json.dumps(settings))
    return output


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Ten samples with zero, one or two images and one or two turns, and two broken ones, beside their images."""
    images = LLAMA.reference["images"]
    samples = [llava_sample(i, images[i % 5 : i % 5 + (1, 0, 2)[i % 3]], turns=1 + i % 2) for i in range(10)]
    samples[1:1] = [llava_sample(90, ["nowhere.png"]), {"id": "malformed", "conversations": 7}]
    return write(tmp_path, samples)


def write(directory: Path, samples: list[Any]) -> Path:
    for name in LLAMA.reference["images"]:
        (directory / name).write_bytes(LLAMA.image_path(name).read_bytes())
    path = directory / "samples.jsonl"
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples), encoding="utf-8")
    return path


class Server:
    """Answers a question with its text and the sizes of all images, in `delay` seconds."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.delay, self.num_open, self.max_open = 0.0, 0, 0
        # After as many requests, no other is answered.
        self.limit = 1_000_000
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, content = outer.answer(body) if self.path == "/v1/chat/completions" else (404, "no such path")
                message = {"role": "assistant", "content": content}
                completion = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"]}
                completion["choices"] = [{"index": 0, "message": message, "finish_reason": "stop"}]
                data = json.dumps(completion if status == 200 else {"error": {"message": content}}).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def answer(self, body: dict[str, Any]) -> tuple[int, str]:
        with self.lock:
            self.requests.append(body)
            number = len(self.requests)
            self.num_open += 1
            self.max_open = max(self.max_open, self.num_open)
        time.sleep(self.delay if number <= self.limit else 600)
        with self.lock:
            self.num_open -= 1
        if body["model"] != "served":
            return 404, "no such model"
        parts = [part for message in body["messages"] if message["role"] == "user" for part in message["content"]]
        urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        images = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]
        question = "".join(part["text"] for part in body["messages"][-1]["content"] if part["type"] == "text")
        return (400, "too long") if "too long" in question else (200, f"{question.strip()} {[i.size for i in images]}")


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    server.http.daemon_threads = True
    thread = threading.Thread(target=server.http.serve_forever)
    thread.start()
    yield server
    server.http.shutdown()
    thread.join()
    server.http.server_close()
