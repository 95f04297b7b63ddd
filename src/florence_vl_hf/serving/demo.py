# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""A web page to chat about images, which also shows the features of each image as colour maps."""

import html
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import gradio as gr
import torch
from PIL import Image
from transformers import GenerationConfig, StoppingCriteriaList, TextIteratorStreamer

from ..analysis import feature_maps
from ..modeling import FlorenceVLForConditionalGeneration
from ..modeling.configuration_florence_vl import IMAGE_FEATURE
from ..processing import FlorenceVLProcessor
from .chat import DECODING, ChatSession, load_image, require_chat_template


QUESTIONS = (
    "Describe the image in detail.",
    "What is the text in the image?",
    "Which objects are in the image, and where?",
)
# Longest side of the images beside the chat, in pixels.
MAX_SHOWN_SIDE = 768
CSS = """
#chat .message img { max-height: 12em; object-fit: contain }
#maps, #maps * { max-height: none }
"""
# Arguments of `Blocks.launch`. The fonts are those of the system: the page requests nothing from other hosts.
LAUNCH: dict[str, Any] = {
    "theme": gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    "css": CSS,
    "footer_links": [],
    "run_history": False,
    "ssr_mode": False,
    "enable_monitoring": False,
    "mcp_server": False,
    "max_file_size": "64mb",
    "quiet": True,
}


@dataclass
class Conversation:
    """The chat of one open page."""

    session: ChatSession
    # Messages of gr.Chatbot.
    messages: list[dict[str, Any]] = field(default_factory=list)
    # Each image, small, and its maps by name, each of shape (height, width, 3).
    images: list[tuple[Image.Image, dict[str, torch.Tensor]]] = field(default_factory=list)
    # Set to end the answer that is being generated.
    stop: threading.Event = field(default_factory=threading.Event)


def stream_answer(conversation: Conversation, question: str, settings: GenerationConfig) -> Iterator[str]:
    """Yield the parts of an answer, until its end or `conversation.stop`, and raise what `ChatSession.answer` does."""
    session, stop = conversation.session, conversation.stop
    streamer = TextIteratorStreamer(session.processor.tokenizer, skip_prompt=True, **DECODING)
    stopping_criteria = StoppingCriteriaList([lambda *args, **kwargs: stop.is_set()])

    def answer() -> None:
        try:
            session.answer(question, streamer, settings, stopping_criteria)
        finally:
            streamer.end()  # `generate` does not after an error

    with ThreadPoolExecutor(max_workers=1) as executor:
        future = executor.submit(answer)
        try:
            yield from streamer
        finally:
            stop.set()  # where the page was closed, or the chat cleared
        future.result()


def as_text(text: str) -> dict[str, str]:
    """Return content of a message of gr.Chatbot, which displays HTML even where it displays no Markdown."""
    return {"type": "text", "text": html.escape(text)}


def paint(feature_map: torch.Tensor, image: Image.Image, is_padded: bool, resample: Image.Resampling) -> Image.Image:
    """Resize a map of shape `(height, width, 3)` to an image, which the processor padded to a square or not."""
    width, height = (max(image.size),) * 2 if is_padded else image.size
    painted = Image.fromarray((feature_map * 255).round().byte().numpy()).resize((width, height), resample)
    left, top = (width - image.width) // 2, (height - image.height) // 2
    return painted.crop((left, top, left + image.width, top + image.height))


def build_demo(
    name: str,
    model: FlorenceVLForConditionalGeneration,
    processor: FlorenceVLProcessor,
    images: Sequence[str] = (),
    max_new_tokens: int = 512,
) -> gr.Blocks:
    """
    Return the page. Start it with `build_demo(...).launch(**LAUNCH)`.

    Args:
        name (`str`): Name of the model on the page.
        model (`FlorenceVLForConditionalGeneration`): The model.
        processor (`FlorenceVLProcessor`): Its processor, which must have a chat template.
        images (sequence of `str`, *optional*): Paths of images that the page offers as examples.
        max_new_tokens (`int`, *optional*, defaults to 512): First value of the setting.
    """
    require_chat_template(processor)
    model = model.eval()
    is_padded = bool(getattr(processor.image_processor, "do_pad", False))
    examples: list[Any] = [{"text": question} for question in QUESTIONS]
    examples += [{"text": QUESTIONS[0], "files": [image]} for image in images]
    idle: dict[str, Any] = {"submit_btn": True, "stop_btn": False, "interactive": True}

    def clear(previous: Conversation | None) -> dict[Any, Any]:
        if previous is not None:
            previous.stop.set()
        new = Conversation(ChatSession(model, processor))
        return {state: new, chatbot: [], gallery: [], box: gr.MultimodalTextbox(value=None, **idle)}

    def use_example(event: gr.SelectData, draft: dict[str, Any]) -> dict[str, Any]:
        files = [file["path"] for file in event.value.get("files", [])]
        return {"text": event.value["text"], "files": draft["files"] + files}

    def show_images(conversation: Conversation, is_smooth: bool) -> list[tuple[Image.Image, str]]:
        resample = Image.Resampling.BICUBIC if is_smooth else Image.Resampling.NEAREST
        shown = []
        for i, (image, maps) in enumerate(conversation.images, start=1):
            shown.append((image, f"image {i}"))
            for key, feature_map in maps.items():
                label = "V" if key == IMAGE_FEATURE else key
                shown.append((paint(feature_map, image, is_padded, resample), f"{i}: {label}"))
        return shown

    def respond(
        conversation: Conversation,
        draft: dict[str, Any],
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        is_smooth: bool,
    ) -> Iterator[dict[Any, Any]]:
        session, question = conversation.session, draft["text"]
        num_images = len(conversation.images)
        settings = deepcopy(model.generation_config)
        settings.update(max_new_tokens=max_new_tokens, max_length=None, num_beams=1, do_sample=temperature > 0)
        # Transformers warns of values that greedy search ignores.
        settings.update(temperature=temperature or None, top_p=top_p if temperature else None)
        content = [*({"path": path} for path in draft["files"]), as_text(question)]
        messages = [*conversation.messages, {"role": "user", "content": content}]
        conversation.stop.clear()
        busy = gr.MultimodalTextbox(value=None, submit_btn=False, stop_btn=True, interactive=False)
        yield {box: busy, chatbot: messages}
        try:
            if not question.strip():
                raise ValueError("There is no question; type one.")
            # All, before the first is encoded.
            for image in [load_image(path) for path in draft["files"]]:
                features = session.add_image(image).features or {}
                image.thumbnail((MAX_SHOWN_SIDE, MAX_SHOWN_SIDE))
                conversation.images.append((image, feature_maps(features, model.config)))
            if draft["files"]:
                yield {gallery: show_images(conversation, is_smooth)}
            messages.append({"role": "assistant", "content": []})
            text = ""
            for part in stream_answer(conversation, question, settings):
                text += part
                messages[-1] = {"role": "assistant", "content": [as_text(text)]}
                yield {chatbot: messages}
        except (ValueError, torch.OutOfMemoryError) as error:
            # As if the question had not been sent.
            session.new_images = []
            del session.features[num_images:], conversation.images[num_images:]
            gr.Warning(html.escape(str(error)), duration=None)
            restored = gr.MultimodalTextbox(value=draft, **idle)
            yield {box: restored, chatbot: conversation.messages, gallery: show_images(conversation, is_smooth)}
        else:
            conversation.messages = messages
            yield {box: gr.MultimodalTextbox(**idle)}

    with gr.Blocks(title="Florence-VL", analytics_enabled=False, fill_width=True) as demo:
        state = gr.State()
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                chatbot = gr.Chatbot(
                    label=name,
                    height="60vh",
                    examples=examples,
                    render_markdown=False,
                    buttons=[],  # "copy" would copy escaped text, "share" sends the chat to the Hub
                    allow_file_downloads=False,
                    elem_id="chat",
                )
                box = gr.MultimodalTextbox(
                    label="Question",
                    show_label=False,
                    placeholder="Ask a question; drop or paste images here",
                    file_types=["image"],
                    file_count="multiple",
                    max_plain_text_length=10**6,  # longer text would become a file
                    interactive=False,  # until there is a conversation
                )
                with gr.Accordion("Settings", open=False):
                    limit = max(4096, max_new_tokens)
                    tokens = gr.Slider(1, limit, max_new_tokens, step=1, label="Maximum number of new tokens")
                    temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0 does not sample.")
                    top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top p", info="Used if the temperature is not 0.")
                    is_smooth = gr.Checkbox(False, label="Smooth feature maps")
            with gr.Column(scale=2, min_width=320):
                gallery = gr.Gallery(
                    label="What the encoder sees",
                    columns=2,
                    height="auto",
                    object_fit="contain",
                    interactive=False,
                    elem_id="maps",
                )
                gr.Markdown(
                    "The first three principal components of features, as red, green and blue: of V, which the "
                    "encoder computes without a prompt, and of its output for each prompt. Where the colours of a "
                    "map are alike, so are the features."
                )
        outputs: list[Any] = [state, chatbot, gallery, box]
        hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        demo.load(clear, state, outputs, **hidden)
        answering = box.submit(
            respond, [state, box, tokens, temperature, top_p, is_smooth], [chatbot, gallery, box], **hidden
        )
        box.stop(lambda conversation: conversation.stop.set(), state, queue=False, **hidden)
        chatbot.clear(clear, state, outputs, cancels=[answering], **hidden)
        chatbot.example_select(use_example, box, box, **hidden)
        is_smooth.change(show_images, [state, is_smooth], gallery, **hidden)
    return demo


__all__ = ["LAUNCH", "build_demo"]
