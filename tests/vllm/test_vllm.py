# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Greedy answers of vLLM, through `LLM` and its OpenAI server, against those of Transformers' `generate`."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from openai import APIConnectionError, OpenAI
from PIL import Image
from vllm import LLM, SamplingParams
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from . import FIXTURES, MODELS, NUM_TOKENS


os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
ENGINE = {
    "model_impl": "transformers",
    "trust_remote_code": True,
    "enforce_eager": True,
    "dtype": "float32",
    "max_model_len": 512,
    "limit_mm_per_prompt": {"image": 2},
    "allowed_local_media_path": str(FIXTURES),
}
MODEL = "florence-vl"
# The chat template has written the BOS.
AS_IT_IS = {"add_special_tokens": False}
Request = dict[str, Any]
Answer = tuple[list[int], list[int]]


@pytest.fixture(scope="class", params=["llama", "phi", "own-prompt"])
def directory(request: pytest.FixtureRequest) -> Path:
    return MODELS / request.param


@pytest.fixture(scope="class")
def requests(directory: Path) -> dict[str, Request]:
    return json.loads((directory / "requests.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="class")
def llm(directory: Path) -> Iterator[LLM]:
    llm = LLM(str(directory), **ENGINE)
    yield llm
    llm.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="class")
def client(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    for name, value in {"model": str(directory), "served_model_name": MODEL, "port": port, **ENGINE}.items():
        command.append(f"--{name.replace('_', '-')}")
        if value is not True:
            command.append(value if isinstance(value, str) else json.dumps(value))
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as server:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        while True:
            assert server.poll() is None, log.read_text()[-3000:]
            try:
                client.models.list()
                break
            except APIConnectionError:
                time.sleep(1)
        yield client
        server.terminate()


TENSOR_PARALLEL = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    engine, chats, num_tokens, answers = json.loads(sys.argv[1])
    llm = LLM(**engine, tensor_parallel_size=2)
    outputs = llm.chat(chats, SamplingParams(temperature=0, max_tokens=num_tokens, min_tokens=num_tokens))
    with open(answers, "w") as file:
        json.dump([[output.prompt_token_ids, list(output.outputs[0].token_ids)] for output in outputs], file)
"""


def expected(requests: dict[str, Request]) -> list[Answer]:
    return [(request["prompt_ids"], request["answer_ids"]) for request in requests.values()]


def test_commands_of_the_documentation():
    text = (FIXTURES.parents[1] / "docs" / "serving.md").read_text(encoding="utf-8").replace("\\\n", "")
    commands = [shlex.split(line)[2:] for line in re.findall(r"^vllm serve .*$", text, flags=re.MULTILINE)]
    assert len(commands) == 3
    for command in commands:
        arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(command)
        assert (arguments.model_impl, arguments.trust_remote_code) == ("transformers", True)


def test_answers_depend_on_images_and_their_order(requests):
    answers = [tuple(request["answer_ids"]) for request in requests.values()]
    assert len(set(answers)) == len(answers) == 5


class TestLLM:
    def run(self, method: Any, prompts: list[Any], **options: Any) -> list[Answer]:
        sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, min_tokens=NUM_TOKENS)
        outputs = method(prompts, sampling, **options)
        return [(output.prompt_token_ids, output.outputs[0].token_ids) for output in outputs]

    def test_one_by_one(self, llm, requests):
        answers = [self.run(llm.chat, [request["messages"]])[0] for request in requests.values()]
        assert answers == expected(requests)

    def test_batch(self, llm, requests):
        answers = self.run(llm.chat, [request["messages"] for request in requests.values()])
        assert answers == expected(requests)

    def test_text_of_the_chat_template(self, llm, requests):
        prompts = [
            {
                "prompt": request["prompt"],
                "multi_modal_data": {"image": [Image.open(image) for image in request["images"]]},
            }
            for request in requests.values()
        ]
        assert self.run(llm.generate, prompts, tokenization_kwargs=AS_IT_IS) == expected(requests)
        prompt_ids = [prompt_ids for prompt_ids, _ in self.run(llm.generate, prompts)]
        assert prompt_ids == [request["prompt_ids_with_special_tokens"] for request in requests.values()]


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="requires two cores")
@pytest.mark.parametrize("directory", ["llama"], indirect=True)
def test_tensor_parallel(directory, requests, tmp_path):
    """In a process of its own, as vLLM starts one per part and binds each to a core."""
    script, file = tmp_path / "tensor_parallel.py", tmp_path / "answers.json"
    script.write_text(TENSOR_PARALLEL, encoding="utf-8")
    chats = [request["messages"] for request in requests.values()]
    arguments = json.dumps([{"model": str(directory), **ENGINE}, chats, NUM_TOKENS, str(file)])
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    subprocess.run([sys.executable, str(script), arguments], env=environment, check=True)
    assert [tuple(answer) for answer in json.loads(file.read_text())] == expected(requests)


class TestServer:
    def options(self, **body: Any) -> dict[str, Any]:
        body |= {"min_tokens": NUM_TOKENS, "return_token_ids": True}
        return {"model": MODEL, "max_tokens": NUM_TOKENS, "temperature": 0, "extra_body": body}

    def chat(self, client: OpenAI, request: Request) -> Answer:
        completion = client.chat.completions.create(messages=request["messages"], **self.options())
        return completion.prompt_token_ids, completion.choices[0].token_ids

    def test_one_by_one(self, client, requests):
        assert [self.chat(client, request) for request in requests.values()] == expected(requests)

    def test_at_the_same_time(self, client, requests):
        with ThreadPoolExecutor() as threads:
            answers = list(threads.map(lambda request: self.chat(client, request), requests.values()))
        assert answers == expected(requests)

    def test_text_of_the_chat_template(self, client, requests):
        request = requests["no image"]
        choice = client.completions.create(prompt=request["prompt"], **self.options(**AS_IT_IS)).choices[0]
        assert (choice.prompt_token_ids, choice.token_ids) == expected({"no image": request})[0]
        choice = client.completions.create(prompt=request["prompt"], **self.options()).choices[0]
        assert choice.prompt_token_ids == request["prompt_ids_with_special_tokens"]
