# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""The server of `transformers serve` for one Florence-VL: an OpenAI-compatible API whose requests are checked."""

import asyncio
import inspect
from typing import Annotated, Any, Literal

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from jinja2 import TemplateError
from PIL import Image
from pydantic import AfterValidator, BaseModel, Field, ValidationError, field_validator
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as ASGIMessage
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerationState, Modality

from ..modeling import FlorenceVLForConditionalGeneration
from ..processing import FlorenceVLProcessor
from ..processing.text import to_utf8
from .chat import require_chat_template
from .request_images import load_request_image


# Other routes of Transformers' server load any model, or unload this one.
ROUTES = ("/v1/chat/completions", "/v1/models", "/health")
DEFAULT_MAX_TOKENS = 1024  # of an answer, as in Transformers
# All images of a request are in memory at once. Pillow refuses a single image of this size.
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 2**26)
# The longest token of the language models is a run of spaces. Longer text is refused before it is encoded.
MAX_CHARACTERS_PER_TOKEN = 128


class TextPart(BaseModel):
    type: Literal["text"]
    text: Annotated[str, AfterValidator(to_utf8)]


class ImageURL(BaseModel):
    url: str


class ImagePart(BaseModel):
    type: Literal["image_url"]
    image_url: ImageURL


class Message(BaseModel):
    role: Literal["system", "user", "assistant"]
    content: list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]

    @field_validator("content", mode="before")
    @classmethod
    def _to_parts(cls, content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content


class ChatRequest(BaseModel, extra="forbid"):
    """
    What a request can set. Transformers ignores other fields of OpenAI's with a warning.

    Its own `generation_config` and `chat_template_kwargs` are refused: they can make a request as costly as one likes.
    """

    model: str
    messages: list[Message] = Field(min_length=1)
    stream: bool | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    frequency_penalty: float | None = Field(None, gt=-1, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)


class ServedModel(ModelManager):
    """The model of the server, in the place of those that Transformers' server loads by name."""

    def __init__(self, name: str, model: FlorenceVLForConditionalGeneration, processor: FlorenceVLProcessor) -> None:
        super().__init__()
        self.name, self.model, self.processor = name, model, processor

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id

    def load_model_and_processor(self, *args: Any, **kwargs: Any) -> Any:
        return self.model, self.processor

    @staticmethod
    def get_model_modality(*args: Any, **kwargs: Any) -> Modality:
        # Transformers looks up its own classes only.
        return Modality.VLM

    def list_models(self, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        return [{"id": self.name, "object": "model", "created": 0, "owned_by": "florence_vl_hf"}]

    # Its name in Transformers 5.19.
    get_gen_models = list_models


class CheckedChatHandler(ChatCompletionHandler):
    """Transformers' handler, which gets valid requests with loaded images only."""

    def __init__(self, served: ServedModel, max_body_bytes: int, allow_private_urls: bool) -> None:
        super().__init__(served, GenerationState())
        self.served, self.max_body_bytes, self.allow_private_urls = served, max_body_bytes, allow_private_urls

    async def handle_request(self, body: dict, request_id: str) -> Any:
        # In a thread, because downloads and decoding take long.
        return await super().handle_request(await asyncio.to_thread(self._check, body), request_id)

    @staticmethod
    def get_processor_inputs_from_messages(messages: list[dict], modality: Modality) -> list[dict]:
        return messages

    def _check(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return a request that can be answered, with images in its messages and a limit of tokens."""
        ignored = {name: body[name] for name in self._unused_fields & body.keys() - ChatRequest.model_fields.keys()}
        try:
            request = ChatRequest.model_validate({name: body[name] for name in body.keys() - ignored.keys()})
        except ValidationError as error:
            raise RequestValidationError(error.errors()) from error
        if request.model != self.served.name:
            raise HTTPException(404, f"Got the model {request.model!r}; this server has {self.served.name!r} only.")
        messages = [message.model_dump() for message in request.messages]
        images = [part for message in messages for part in message["content"] if part["type"] == "image_url"]
        for part in images:
            part["type"] = "image"
        try:
            remaining = self._remaining_context(messages, len(images))
            num_pixels = 0
            for part in images:
                part["image"] = load_request_image(
                    part.pop("image_url")["url"], self.max_body_bytes, self.allow_private_urls
                )
                num_pixels += part["image"].width * part["image"].height
                if num_pixels > MAX_PIXELS:
                    raise ValueError(
                        f"The images of a request can have {MAX_PIXELS:,} pixels in all; send smaller ones."
                    )
        except (TemplateError, ValueError) as error:
            raise HTTPException(400, str(error)) from error
        max_tokens = request.max_completion_tokens or request.max_tokens or DEFAULT_MAX_TOKENS
        settings = request.model_dump(exclude_none=True, exclude={"max_completion_tokens"})
        return {**ignored, **settings, "messages": messages, "max_tokens": min(max_tokens, remaining)}

    def _remaining_context(self, messages: list[dict[str, Any]], num_images: int) -> int:
        """Return the number of tokens that an answer can have, before any image is loaded."""
        processor, context = self.served.processor, self.served.model.config.text_config.max_position_embeddings
        prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # The user's text is part of the prompt, and so are image tokens in it.
        num_placeholders = prompt.count(processor.image_token)
        if num_placeholders != num_images:
            raise ValueError(
                f"Got {num_images} images but {num_placeholders} times {processor.image_token!r}, which stands for an "
                f"image; remove it from the text, and send images in messages of the user."
            )
        num_tokens = num_images * (processor.num_image_tokens - 1)
        if len(prompt) <= MAX_CHARACTERS_PER_TOKEN * context:
            num_tokens += len(processor.tokenizer(prompt, add_special_tokens=False).input_ids)
            if num_tokens < context:
                return context - num_tokens
        raise ValueError(f"The conversation is longer than {context:,} tokens, the model's context; shorten it.")


class _BodyLimit:
    """Limits the size of what a request sends, with or without a Content-Length."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        num_bytes = 0

        async def receive_limited() -> ASGIMessage:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.max_bytes:
                while message.get("more_body"):  # many clients read no answer before they have sent everything
                    message = await receive()
                raise HTTPException(413, f"The request has more than {self.max_bytes:,} bytes; send smaller images.")
            return message

        await self.app(scope, receive_limited, send)


async def _answer_error(request: Request, error: Exception) -> Response:
    """Describe an error in the format of OpenAI's API."""
    status, message = 500, "The server failed; its log says why."
    if isinstance(error, StarletteHTTPException):
        status, message = error.status_code, error.detail
    elif isinstance(error, RequestValidationError):
        first = error.errors()[0]
        status, message = 400, f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status)


def build_app(
    name: str,
    model: FlorenceVLForConditionalGeneration,
    processor: FlorenceVLProcessor,
    max_body_bytes: int,
    allow_private_urls: bool = False,
) -> FastAPI:
    """
    Return Transformers' server with one model.

    Args:
        name (`str`): Name of the model in requests.
        model (`FlorenceVLForConditionalGeneration`): The model.
        processor (`FlorenceVLProcessor`): Its processor, which must have a chat template.
        max_body_bytes (`int`): Maximum size of a request, and of an image that is downloaded for it.
        allow_private_urls (`bool`, *optional*, defaults to `False`): Whether to download images from any address.
    """
    require_chat_template(processor)
    served = ServedModel(name, model.eval(), processor)
    handler = CheckedChatHandler(served, max_body_bytes, allow_private_urls)
    # Which other handlers there are depends on the release of Transformers; their routes are removed.
    parameters = inspect.signature(build_server).parameters
    handlers: dict[str, Any] = {parameter: None for parameter in parameters if parameter.endswith("_handler")}
    handlers["chat_handler"] = handler
    app = build_server(served, **handlers, generation_state=handler.generation_state)
    app.router.routes = [route for route in app.routes if getattr(route, "path", None) in ROUTES]
    # The innermost, so that its error reaches the handler below.
    app.user_middleware.append(Middleware(_BodyLimit, max_bytes=max_body_bytes))
    for kind in (StarletteHTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _answer_error)
    return app
