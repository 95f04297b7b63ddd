# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""`florence-vl serve`, asked by OpenAI's client over loopback."""

import base64
import http.server
import io
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
import uvicorn
from huggingface_hub.utils import httpx
from PIL import Image

from florence_vl_hf.conversion import load_pretrained
from florence_vl_hf.serving import request_images, server

from ..conftest import status


MAX_TOKENS = 6
MAX_BODY_BYTES = 2_000_000
ONE_MODEL = pytest.mark.parametrize("golden", ["llama-small"], indirect=True, scope="session")


@contextmanager
def serving(app):
    """Run a server in a thread, and return its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        runner = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=runner.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            runner.should_exit = True
            thread.join()


def client_of(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def loaded(converted):
    return load_pretrained(converted, device_map="cpu")


@pytest.fixture(scope="module")
def client(loaded):
    with serving(server.build_app("tiny", *loaded, MAX_BODY_BYTES)) as address:
        yield client_of(address)


@pytest.fixture
def image_host(golden):
    """A host of images on 127.0.0.2, which also redirects to others. Its `requests` are (path, Host)."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requests.append((self.path, self.headers["Host"]))
            if self.path.startswith("/to/"):
                self.send_response(302)
                self.send_header("Location", self.path.removeprefix("/to/"))
                return self.end_headers()
            content = golden.image_path("odd.jpg").read_bytes() if self.path == "/odd.jpg" else b"no image" * 10**6
            self.send_response(404 if self.path == "/missing.jpg" else 200)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.2", 0), Handler) as host:
        host.requests, host.url = [], f"http://127.0.0.2:{host.server_port}"
        threading.Thread(target=host.serve_forever, daemon=True).start()
        yield host
        host.shutdown()


def data_url(image: Path | bytes) -> str:
    return (
        f"data:image/png;base64,{base64.b64encode(image if isinstance(image, bytes) else image.read_bytes()).decode()}"
    )


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    return file.getvalue()


def user(*parts: str) -> dict:
    """Return a turn of texts and of images, which are URLs."""
    is_image = [bool(re.match("[a-z]+:", part)) for part in parts]
    items = [
        {"type": "image_url", "image_url": {"url": part}} if image else {"type": "text", "text": part}
        for part, image in zip(parts, is_image, strict=True)
    ]
    return {"role": "user", "content": items}


def ask(client, *messages, **settings):
    settings = {"model": "tiny", "temperature": 0, "max_tokens": MAX_TOKENS} | settings
    return client.chat.completions.create(messages=list(messages), **settings)


def text_of(completion) -> str:
    return completion.choices[0].message.content


def post(client, body):
    headers = {"Content-Type": "application/json"}
    return httpx.post(f"{client.base_url}chat/completions", content=body, headers=headers)


def generated(loaded, *messages) -> str:
    """Answer with the model alone."""
    model, processor = loaded
    turns = [
        {
            "role": message["role"],
            "content": [
                {"type": "image", "url": part["image_url"]["url"]} if part["type"] == "image_url" else part
                for part in message["content"]
            ],
        }
        for message in messages
    ]
    inputs = processor.apply_chat_template(
        turns, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    output_ids = model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
    return processor.decode(output_ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def conversations(golden):
    odd, tall = (data_url(golden.image_path(name)) for name in ("odd.jpg", "tall.png"))
    system, answer = user("Be brief.") | {"role": "system"}, user("It is odd.") | {"role": "assistant"}
    return {
        "text": [user("Hello")],
        "image": [user(odd, "What is it?")],
        "two images": [user(tall, odd, "And these?")],
        "turns": [system, user(odd, "What is it?"), answer, user(tall, "This?")],
    }


class TestAnswers:
    def test_are_those_of_generate_for_four_clients_at_once(self, client, loaded, conversations):
        expected = [generated(loaded, *messages) for messages in conversations.values()]
        assert len(set(expected)) == 4
        with ThreadPoolExecutor(4) as pool:
            answers = pool.map(lambda messages: text_of(ask(client, *messages)), list(conversations.values()) * 2)
        assert list(answers) == expected * 2

    # Answers whose tokens form UTF-8; other tokens of a model with random weights are streamed as other characters.
    @pytest.mark.parametrize("name", ["text", "two images"])
    def test_stream(self, client, conversations, name):
        chunks = list(ask(client, *conversations[name], stream=True))
        assert len(chunks) > 3 and chunks[-1].choices[0].finish_reason == "length"
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert streamed == text_of(ask(client, *conversations[name]))

    def test_limits(self, client, loaded):
        completion = ask(client, user("Hello"), max_tokens=openai.omit, max_completion_tokens=3)
        assert completion.usage.completion_tokens == 3 and completion.model == "tiny"
        context = loaded[0].config.text_config.max_position_embeddings
        usage = ask(client, user("a " * (context - 200)), max_tokens=10**9).usage
        assert 0 < usage.completion_tokens <= context - usage.prompt_tokens < 200

    def test_only_the_model_is_served(self, client):
        assert [model.id for model in client.models.list()] == ["tiny"]
        for path in ("load_model", "reset", "v1/responses", "v1/completions"):
            address = str(client.base_url).removesuffix("v1/") + path
            assert httpx.post(address, json={"model": "tiny", "input": "Hello", "prompt": "Hello"}).status_code == 404


@ONE_MODEL
class TestRefusals:
    @pytest.mark.parametrize(
        ("messages", "settings", "code", "reason"),
        [
            ([user("Hello")], {"model": "gpt2"}, 404, "Got the model 'gpt2'; this server has 'tiny' only."),
            ([{"role": "tool", "content": "Hello"}], {}, 400, "messages.0.role: Input should be 'system', 'user'"),
            ([user("Hello"), {"role": "system", "content": "Hello"}], {}, 400, "Got a turn of system"),
            ([user("What does <image> mean?")], {}, 400, "Got 0 images but 1 times '<image>'"),
            ([user("word " * 20_000)], {}, 400, "The conversation is longer than"),
            ([user("x" * MAX_BODY_BYTES)], {}, 413, "The request has more than 2,000,000 bytes"),
            ([], {}, 400, "messages: List should have at least 1 item"),
            ([user("Hello")], {"extra_body": {"generation_config": "{}"}}, 400, "generation_config: Extra inputs"),
            ([user(data_url(b"text"))], {}, 400, "'data:image/png;base64' (no known image format)"),
            ([user(data_url(b"\x89PNG\r\n\x1a\n"))], {}, 400, "Cannot read the image"),
            ([user("data:image/png;base64,?")], {}, 400, "Only base64 data is allowed"),
            ([user(data_url(png(12_001, 1)))], {}, 400, "12001 x 1 pixels, more than"),
            ([user(data_url(png(15_000, 12_000)))], {}, 400, "exceeds limit"),
            ([user(*[data_url(png(12_000, 8_000))] * 2)], {}, 400, "The images of a request can have"),
            ([user("file:///etc/passwd")], {}, 400, "expected a URL that begins with http:, https: or data:"),
            ([user("http://localhost:9/a.png")], {}, 400, "localhost is the address"),
            ([user("http://169.254.169.254/a.png")], {}, 400, "which is not public"),
        ],
    )  # fmt: skip
    def test_say_why_and_the_next_request_is_served(self, client, messages, settings, code, reason):
        with pytest.raises(openai.APIStatusError) as error:
            ask(client, *messages, **settings)
        assert error.value.status_code == code and error.value.body["type"] == "invalid_request_error"
        assert reason in error.value.body["message"] and len(error.value.body["message"]) < 400
        assert ask(client, user("Hello")).usage.completion_tokens == MAX_TOKENS

    def test_body_without_a_length(self, client):
        response = post(client, (b" " * 10**6 for _ in range(3)))
        assert response.status_code == 413 and "bytes" in response.json()["error"]["message"]

    @pytest.mark.parametrize(
        ("part", "code"),
        [
            (r'{"type": "text", "text": "\ud800"}', 200),
            (r'{"type": "image_url", "image_url": {"url": "http://\ud800/"}}', 400),
        ],
    )
    def test_lone_surrogates(self, client, part, code):
        body = f'{{"model": "tiny", "max_tokens": 1, "messages": [{{"role": "user", "content": [{part}]}}]}}'
        assert post(client, body).status_code == code


def test_public_addresses():
    private = (
        "10.0.0.1 100.64.0.1 224.0.0.1 0.0.0.0 ::1 fe80::1 fc00::1 ::ffff:127.0.0.1 64:ff9b::7f00:1 2002:7f00:1::"
    )
    assert [address for address in private.split() if request_images.is_public(address)] == []
    public = "8.8.8.8 2001:4860:4860::8888 64:ff9b::808:808"
    assert [address for address in public.split() if not request_images.is_public(address)] == []


@ONE_MODEL
class TestURLs:
    def test_private_address_is_not_asked(self, client, image_host):
        with pytest.raises(openai.BadRequestError, match="127.0.0.2, which is not public"):
            ask(client, user(f"{image_host.url}/odd.jpg", "What is it?"))
        assert image_host.requests == []

    def test_redirect_to_a_private_address_is_not_followed(self, client, image_host, conversations, monkeypatch):
        monkeypatch.setattr(request_images, "is_public", lambda address: address == "127.0.0.2")
        answer = ask(client, user(f"{image_host.url}/to//odd.jpg", "What is it?"))
        assert text_of(answer) == text_of(ask(client, *conversations["image"]))
        private = f"http://localhost:{image_host.server_port}/odd.jpg"
        with pytest.raises(openai.BadRequestError, match="localhost is the address .*, which is not public"):
            ask(client, user(f"{image_host.url}/to/{private}"))
        host = image_host.url.removeprefix("http://")
        assert image_host.requests == [("/to//odd.jpg", host), ("/odd.jpg", host), (f"/to/{private}", host)]

    def test_name_is_resolved_once_and_sent(self, image_host, monkeypatch):
        names, resolve = [], socket.getaddrinfo

        def resolve_locally(host, *arguments, **kwargs):
            names.append(host)
            return resolve("127.0.0.2" if host == "example.org" else host, *arguments, **kwargs)

        monkeypatch.setattr(socket, "getaddrinfo", resolve_locally)
        monkeypatch.setattr(request_images, "is_public", lambda address: True)
        with httpx.Client(transport=request_images.PublicTransport()) as http_client:
            assert http_client.get(f"http://example.org:{image_host.server_port}/odd.jpg").status_code == 200
        assert image_host.requests == [("/odd.jpg", f"example.org:{image_host.server_port}")]
        assert names.count("example.org") == 1

    def test_allowed_private_addresses(self, loaded, image_host, conversations):
        with serving(server.build_app("tiny", *loaded, MAX_BODY_BYTES, allow_private_urls=True)) as address:
            client = client_of(address)
            answer = text_of(ask(client, user(f"{image_host.url}/odd.jpg", "What is it?")))
            for path, reason in (("missing.jpg", "404"), ("large", "more than 2,000,000 bytes")):
                with pytest.raises(openai.BadRequestError, match=reason):
                    ask(client, user(f"{image_host.url}/{path}"))
        assert answer == generated(loaded, *conversations["image"])


class TestCommand:
    @pytest.mark.slow
    @ONE_MODEL
    def test_original_checkpoint(self, golden, conversations):
        checkpoint = str(golden.checkpoint)
        command = [sys.executable, "-m", "florence_vl_hf", "serve", checkpoint, "--port", "0", "--device", "cpu"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            address = re.search("http://127.0.0.1:[0-9]+", process.stdout.readline()).group()
            answer = ask(client_of(address), *conversations["image"], model=checkpoint)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
        assert text_of(answer) == generated(load_pretrained(checkpoint, device_map="cpu"), *conversations["image"])

    def test_missing_model(self, capfd):
        assert status("serve", "nowhere", "--port", "0") == 1
        assert re.fullmatch("florence-vl: error: nowhere .*\n", capfd.readouterr().err)

    def test_port_in_use(self, capfd):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            assert status("serve", "nowhere", "--port", str(listener.getsockname()[1])) == 1
        assert re.fullmatch(
            "florence-vl: error: .*in use.*; choose another --port or --host.\n", capfd.readouterr().err
        )
