# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import pytest
from transformers import pipeline


@pytest.fixture(scope="module")
def pipe(converted):
    return pipeline("image-text-to-text", model=str(converted))


def ask(golden, *names: str) -> list[dict]:
    content = [{"type": "image", "path": str(golden.image_path(name))} for name in names]
    return [{"role": "user", "content": [*content, {"type": "text", "text": "What is shown?"}]}]


def test_batched_chats_equal_single_chats(pipe, golden):
    chats = [ask(golden, "odd.jpg"), ask(golden, "tall.png", "wide.png"), ask(golden, "alpha.png")]
    settings = {"max_new_tokens": 5}
    alone = [pipe(text=chat, **settings) for chat in chats]
    batched = pipe(text=chats, batch_size=3, **settings)
    assert [result[0]["generated_text"] for result in batched] == [result[0]["generated_text"] for result in alone]


def test_chat_without_images(pipe, golden):
    assert pipe(text=ask(golden), max_new_tokens=5)[0]["generated_text"]


def test_prompt_with_image_token(pipe, golden):
    result = pipe(images=str(golden.image_path("odd.jpg")), text="<image>What is shown?", max_new_tokens=5)
    assert result[0]["generated_text"]
