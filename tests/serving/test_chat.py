# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import http.server
import threading
from functools import partial

import pytest
import torch
from PIL import Image
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from florence_vl_hf.serving import ChatSession, load_image


SETTINGS = GenerationConfig(max_new_tokens=4, do_sample=False)


def fresh_answer(model, processor, messages):
    """Answer a whole conversation at once, from pixel values."""
    inputs = processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    output_ids = model.generate(**inputs, generation_config=SETTINGS)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(output_ids, skip_special_tokens=True).strip()


@pytest.fixture
def encoded(model):
    """Batch sizes of all calls of the vision tower."""
    sizes = []
    hook = model.model.vision_tower.register_forward_hook(
        lambda module, args, kwargs, output: sizes.append(len(args[0] if args else kwargs["pixel_values"])),
        with_kwargs=True,
    )
    yield sizes
    hook.remove()


class TestChatSession:
    def test_images_of_several_turns_are_encoded_once(self, golden, model, processor, encoded):
        session = ChatSession(model, processor, [str(golden.image_path("odd.jpg"))])
        answers = [session.answer("What is it?", generation_config=SETTINGS)]
        session.add_image(golden.image("tall.png").convert("RGB"))
        session.add_image(str(golden.image_path("alpha.png")))
        answers.append(session.answer("And these?", generation_config=SETTINGS))
        answers.append(session.answer("Sure?", generation_config=SETTINGS))
        assert encoded == [1, 1, 1]
        assert [message["role"] for message in session.messages] == ["user", "assistant"] * 3
        num_images = [sum(item["type"] == "image" for item in turn["content"]) for turn in session.messages[::2]]
        assert num_images == [1, 2, 0]
        for turn in range(3):
            assert fresh_answer(model, processor, session.messages[: 2 * turn + 1]) == answers[turn]

    def test_later_images_change_answers(self, golden, model, processor):
        """So that the test above cannot pass with features in a wrong order, or of the first image alone."""
        features = {}
        for names in (("odd.jpg", "tall.png"), ("tall.png", "odd.jpg")):
            session = ChatSession(model, processor, [golden.image(name).convert("RGB") for name in names])
            features[names] = torch.cat(session.features)
        assert not torch.allclose(*features.values())

    def test_without_an_image(self, model, processor):
        session = ChatSession(model, processor)
        answer = session.answer("Hello", generation_config=SETTINGS)
        assert fresh_answer(model, processor, session.messages[:1]) == answer

    def test_reset(self, golden, model, processor):
        session = ChatSession(model, processor, [str(golden.image_path("odd.jpg"))])
        session.answer("What is it?", generation_config=SETTINGS)
        session.add_image(str(golden.image_path("tall.png")))
        session.reset()
        assert session.answer("Hello", generation_config=SETTINGS) == fresh_answer(
            model, processor, [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
        )

    @pytest.mark.parametrize(
        ("question", "message"),
        [("What does <image> mean?", "<image> stands for an image"), ("word " * 20_000, "the model supports")],
    )
    def test_refused_question_leaves_the_history(self, question, message, golden, model, processor):
        session = ChatSession(model, processor, [str(golden.image_path("odd.jpg"))])
        with pytest.raises(ValueError, match=message):
            session.answer(question)
        session.answer("What is it?", generation_config=SETTINGS)
        assert len(session.messages) == 2 and session.messages[0]["content"][0]["type"] == "image"

    def test_interrupted_answer_leaves_the_history(self, golden, model, processor):
        class Interruption(BaseStreamer):
            def put(self, value):
                raise KeyboardInterrupt

            def end(self):
                pass

        session = ChatSession(model, processor, [str(golden.image_path("odd.jpg"))])
        with pytest.raises(KeyboardInterrupt):
            session.answer("What is it?", Interruption())
        answer = session.answer("What is it?", generation_config=SETTINGS)
        assert len(session.messages) == 2 and fresh_answer(model, processor, session.messages[:1]) == answer

    @pytest.mark.parametrize("question", ["\ud800 \udcff", "\x00\x1b[A\x07\r\v", "ÿ\u202e\U0001f600"])
    def test_any_text_is_answered(self, question, model, processor):
        session = ChatSession(model, processor)
        session.answer(question, generation_config=SETTINGS)
        assert len(session.messages) == 2


class TestLoadImage:
    @pytest.fixture
    def server(self, tmp_path):
        Image.new("RGB", (3, 2), "red").save(tmp_path / "red.png")
        (tmp_path / "page.html").write_text("<html></html>")
        handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_port}"
            server.shutdown()

    def test_url(self, server):
        assert load_image(f"{server}/red.png").getpixel((0, 0)) == (255, 0, 0)

    @pytest.mark.parametrize("page", ["page.html", "missing.png"])
    def test_url_without_an_image(self, page, server):
        with pytest.raises(ValueError, match=rf"/{page} cannot be read as an image \(no known image format\)"):
            load_image(f"{server}/{page}")

    def test_unreachable_url(self):
        with pytest.raises(ValueError, match="^http://127.0.0.1:9/a.png cannot be read as an image"):
            load_image("http://127.0.0.1:9/a.png")

    @pytest.mark.parametrize("name", ["missing.png", "", "a" * 5000, "a\x00b", "."])
    def test_missing_file(self, name, tmp_path):
        with pytest.raises(ValueError, match="There is no image "):
            load_image(name and str(tmp_path / name))

    @pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a" + b"\xff" * 40, b"text"])
    def test_broken_file(self, content, tmp_path):
        (tmp_path / "broken.png").write_bytes(content)
        with pytest.raises(ValueError, match="broken.png cannot be read as an image") as error:
            load_image(str(tmp_path / "broken.png"))
        assert "\n" not in str(error.value)
