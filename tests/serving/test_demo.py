# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""`florence-vl demo`, used in a browser that reaches no other host."""

import re
import signal
import subprocess
import sys

import pytest
import torch
from huggingface_hub.utils import httpx

from florence_vl_cli.serve import listen
from florence_vl_hf.conversion import load_pretrained

from ..conftest import status


ATTACK = "<img src=http://192.0.2.1/x onerror=document.title='attacked'> **bold** <b>b</b> $x$ &amp;\n# end"
ONE_MODEL = pytest.mark.parametrize("golden", ["llama-small"], indirect=True, scope="session")


def free_port() -> int:
    with listen("127.0.0.1", 0) as listener:
        return listener.getsockname()[1]


def test_missing_gradio(monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert status("demo", "anywhere") == 1
    error = capfd.readouterr().err
    assert error == "florence-vl: error: The demo requires more packages; run `pip install 'florence_vl_hf[demo]'`.\n"


def test_missing_image_and_busy_port_are_found_before_the_model_loads(capfd):
    pytest.importorskip("gradio")
    assert status("demo", "anywhere", "nowhere.png") == 1
    assert "There is no image nowhere.png" in capfd.readouterr().err
    with listen("127.0.0.1", 0) as listener:
        assert status("demo", "anywhere", "--port", str(listener.getsockname()[1])) == 1
    assert "choose another --port" in capfd.readouterr().err


@pytest.mark.slow
@ONE_MODEL
def test_command(golden):
    pytest.importorskip("gradio")
    command = [sys.executable, "-m", "florence_vl_hf", "demo", str(golden.checkpoint), "--port", str(free_port())]
    process = subprocess.Popen([*command, "--device", "cpu"], stdout=subprocess.PIPE, text=True)
    assert "Florence-VL" in httpx.get(process.stdout.readline().split()[1]).text
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0


@pytest.fixture(scope="module")
def demo(golden, converted):
    """A page with an example, and its model."""
    pytest.importorskip("gradio")
    from florence_vl_hf.serving.demo import LAUNCH, build_demo

    model, processor = load_pretrained(converted, device_map="cpu", dtype=torch.float32)
    demo = build_demo("tiny", model, processor, [str(golden.image_path("square.png"))], max_new_tokens=6)
    demo.launch(**LAUNCH, server_port=free_port(), prevent_thread_lock=True)
    yield demo.local_url, model, processor
    demo.close()


@pytest.fixture
def page(demo, browser, request):
    page = browser.new_page(viewport={"width": request.param, "height": 844})
    page.set_default_timeout(60_000)
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(demo[0])
    page.wait_for_selector("textarea:enabled")
    yield page
    assert [url for url in requests if not url.startswith((demo[0], "blob:", "data:"))] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= request.param


def attach(page, *paths):
    before = page.locator(".thumbnail-wrapper").count()
    page.set_input_files("input[type=file]", [str(path) for path in paths])
    page.wait_for_function(f"document.querySelectorAll('.thumbnail-wrapper').length >= {before + len(paths)}")


def ask(page, question):
    page.fill("textarea", question)
    page.locator("button.submit-button").click()


def answers(page, number):
    """Wait until the page is idle with as many answers, and return their texts."""
    page.wait_for_function(f"document.querySelectorAll('#chat .bot.message').length == {number}")
    page.wait_for_selector("button.submit-button")
    return page.locator("#chat .bot.message").all_inner_texts()


@pytest.mark.slow
@ONE_MODEL
@pytest.mark.parametrize("page", [1280, 390], indirect=True)
def test_chat_about_images_of_several_turns(page, golden, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    attach(page, golden.image_path("odd.jpg"))
    ask(page, "What is it?")
    assert answers(page, 1)[0].strip()
    assert [caption.strip() for caption in page.locator("#maps .caption-label").all_inner_texts()] == [
        "image 1", "1: V", "1: caption", "1: ocr", "1: grounding"
    ]  # fmt: skip
    page.evaluate("Promise.all([...document.images].map((i) => (i.loading = 'eager', i.decode())))")
    # Errors leave the conversation as it is, and the question in its place.
    for question, path, message in (
        ("What does <image> mean?", golden.image_path("wide.png"), "<image> stands for an image"),
        ("word " * 9000, None, "the model supports"),
        ("And this?", tmp_path / "broken.png", "broken.png cannot be read as an image"),
    ):
        if path is not None:
            attach(page, path)
        ask(page, question)
        page.locator(".toast-body", has_text=message).locator("button.toast-close").click()
        assert len(answers(page, 1)) == 1 and page.input_value("textarea") == question
        assert page.locator("#maps .caption-label").count() == 5
        if path is not None:
            page.get_by_label("Remove file").click()
    attach(page, golden.image_path("tall.png"))
    ask(page, "And this?")
    assert len(answers(page, 2)) == 2 and page.locator("#maps .caption-label").count() == 10
    page.get_by_label("Clear").click()
    page.locator("#chat button.example", has=page.locator("img")).click()
    page.wait_for_selector(".thumbnail-wrapper")
    ask(page, page.input_value("textarea"))
    assert len(answers(page, 1)) == 1 and page.locator("#maps .caption-label").count() == 5


@pytest.mark.slow
@ONE_MODEL
@pytest.mark.parametrize("page", [1280], indirect=True)
def test_answers_are_streamed_and_shown_as_text(page, demo, monkeypatch):
    _, model, processor = demo
    ids = processor.tokenizer(ATTACK, return_tensors="pt", add_special_tokens=False).input_ids
    stopped = []

    def generate(input_ids, streamer, stopping_criteria, **kwargs):
        streamer.put(input_ids)
        for token in ids[0]:
            streamer.put(token[None])
        while not stopping_criteria(input_ids, None)[0]:
            pass
        stopped.append(True)
        streamer.end()
        return torch.cat([input_ids, ids], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    ask(page, ATTACK)
    page.locator("#chat .bot.message", has_text="&amp;").wait_for()
    assert stopped == []  # shown before the answer ends
    page.locator("button.stop-button").click()
    [answer] = answers(page, 1)
    question = page.locator("#chat .user.message").inner_text()
    assert re.split(r"\s+", answer.strip()) == re.split(r"\s+", question.strip()) == re.split(r"\s+", ATTACK)
    assert page.title() == "Florence-VL" and stopped == [True]
