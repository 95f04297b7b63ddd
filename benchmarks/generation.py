# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Answers: time to the first token, decoding, many requests, later turns, and how cost grows with the input."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from transformers import CompileConfig, GenerationConfig, PreTrainedModel, StoppingCriteria

from florence_vl_hf.modeling.generation_florence_vl import encoder_outputs
from florence_vl_hf.modeling.transformers_compat import CACHE
from florence_vl_hf.processing import IMAGE_TOKEN
from florence_vl_hf.serving import ChatSession

from .measuring import Row, compare, elapsed, own_seconds, record_products, synchronize
from .models import Setup, causal_lm


# Elements copied to measure a device's bandwidth: more than any cache holds.
NUM_COPIED = 2**27


def settings(num_tokens: int) -> dict[str, Any]:
    """Settings of `generate` for this many tokens, whatever the model answers."""
    return {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "do_sample": False}


def first_token(setup: Setup) -> Iterator[Row]:
    """Time from a prepared prompt with one image to the first token of the answer."""
    yield from prefill(setup, "first token", [setup.messages()])


def growth(setup: Setup) -> Iterator[Row]:
    """Time to the first token for more images, more samples and more text."""
    inputs = {
        "images per sample": {number: [setup.messages(number)] for number in setup.batch_sizes(1, 2, 4, 8)},
        "samples": {number: [setup.messages()] * number for number in setup.batch_sizes(1, 2, 4, 8, 16)},
        "words": {number: [setup.messages(num_words=number)] for number in (16, 128, 1024)},
    }
    for quantity, conversations in inputs.items():
        first: Row | None = None
        for number, batch in conversations.items():
            for row in prefill(setup, f"first token, {number} {quantity}", batch):
                first = first or row
                yield replace(row, details={**row.details, "times the smallest": row.ours / first.ours})


def prefill(setup: Setup, name: str, conversations: list[list[dict[str, Any]]]) -> Iterator[Row]:
    inputs = with_distinct_images(setup, setup.inputs(setup.processor, conversations))
    peer_inputs = setup.inputs(setup.peer_processor, conversations)

    def ours() -> torch.Tensor:
        return (
            setup.model.generate(**inputs, **settings(1), return_dict_in_generate=True, output_logits=True)
            .logits[0]
            .float()
        )

    @torch.no_grad()
    def original() -> torch.Tensor:
        return setup.original.logits(**inputs)[:, -1]

    products = record_products(setup.model, ours)
    yield from compare(
        name,
        ours,
        {
            "original": original,
            "peer": lambda: setup.peer.generate(**peer_inputs, **settings(1)),
            "limit": products.replay(),
        },
        setup.repeats,
        check_original=setup.check_equal,
        details={"flops": products.flops},
    )


def with_distinct_images(setup: Setup, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Replace the images, which ours encodes once where they are equal."""
    return {**inputs, "pixel_values": setup.pixel_values(len(inputs["pixel_values"]))}


class Clock(StoppingCriteria):
    """The time of each token, in seconds."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def decode(model: PreTrainedModel, num_tokens: int, make_inputs: Callable[[], dict[str, Any]]) -> float:
    """Generate, and return the seconds from the first token to the last, `num_tokens` later."""
    clock = Clock()
    model.generate(**make_inputs(), **settings(num_tokens + 1), stopping_criteria=[clock])
    return clock.times[-1] - clock.times[0]


def decoding(setup: Setup) -> Iterator[Row]:
    """Decode tokens after a prompt with one image, which is encoded before."""
    num_tokens = 4 if setup.small else 32
    with torch.no_grad():
        image = setup.pixel_values(1)
        feature = setup.model.get_image_features(image, return_dict=True).pooler_output[0]
        peer_image = setup.pixel_values(1, setup.peer.config.vision_config.image_size)
        peer_feature = setup.peer.get_image_features(peer_image, return_dict=True).pooler_output[0]
    language_model = causal_lm(setup.model)
    for batch_size in (1, 2 if setup.small else 16):
        conversations = [setup.messages()] * batch_size
        inputs = text_inputs(setup, setup.processor, conversations)
        peer_inputs = text_inputs(setup, setup.peer_processor, conversations)
        is_image = (inputs["input_ids"] == setup.config.image_token_id).unsqueeze(-1)
        with torch.no_grad():
            embeds = setup.model.get_input_embeddings()(inputs["input_ids"])
            embeds = embeds.masked_scatter(is_image, feature.repeat(batch_size, 1))
        embedded = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}

        def ours(inputs: dict[str, Any] = inputs, batch_size: int = batch_size, **options: Any) -> float:
            return decode(setup.model, num_tokens, lambda: {**with_features(inputs, feature, batch_size), **options})

        def original(embedded: dict[str, Any] = embedded, **options: Any) -> float:
            return decode(language_model, num_tokens, lambda: {**embedded, **options})

        def peer(inputs: dict[str, Any] = peer_inputs, batch_size: int = batch_size) -> float:
            return decode(setup.peer, num_tokens, lambda: with_features(inputs, peer_feature, batch_size))

        with torch.no_grad():
            outputs = setup.model(**with_features(inputs, feature, batch_size), logits_to_keep=1)
        cache = outputs[CACHE]
        step = {"input_ids": inputs["input_ids"][:, -1:], CACHE: cache}
        products = record_products(setup.model, lambda step=step: setup.model(**step))
        replay = products.replay()
        parameters = [*setup.model.model.language_model.layers.parameters(), setup.model.lm_head.weight]
        num_bytes = sum(parameter.nbytes for parameter in parameters)
        num_bytes += sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

        def limit(replay: Callable[[], None] = replay) -> float:
            return elapsed(lambda: [replay() for _ in range(num_tokens)])

        def bandwidth(num_bytes: int = num_bytes) -> float:
            source = torch.zeros(NUM_COPIED, dtype=torch.uint8, device=setup.device)
            target = torch.empty_like(source)
            target.copy_(source)
            return num_tokens * num_bytes * elapsed(lambda: target.copy_(source)) / (2 * NUM_COPIED)

        yield from compare(
            f"decoding, batch {batch_size}",
            ours,
            {"original": original, "peer": peer, "limit": limit, "bandwidth": bandwidth},
            setup.repeats,
            "tokens/s",
            num_tokens * batch_size,
            own_seconds,
            details={"flops": products.flops * num_tokens, "bytes": num_bytes * num_tokens},
        )
        compile_config = CompileConfig(fullgraph=True, mode="default")
        compile_config._compile_all_devices = True  # Transformers compiles on accelerators only
        compiled = {"cache_implementation": "static", "compile_config": compile_config}
        yield from compare(
            f"decoding, static and compiled, batch {batch_size}",
            lambda ours=ours, compiled=compiled: ours(**compiled),
            {
                "original": lambda original=original, compiled=compiled: original(**compiled),
                "dynamic": ours,
                "limit": limit,
            },
            setup.repeats,
            "tokens/s",
            num_tokens * batch_size,
            own_seconds,
            with_memory=False,
        )


def text_inputs(setup: Setup, processor: Any, conversations: list[list[dict[str, Any]]]) -> dict[str, torch.Tensor]:
    inputs = setup.inputs(processor, conversations)
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def with_features(inputs: dict[str, Any], feature: torch.Tensor, batch_size: int) -> dict[str, Any]:
    """Add the features of one image for each sample, as `generate` takes them."""
    return {**inputs, "mm_encoder_outputs": encoder_outputs([feature] * batch_size)}


def requests(setup: Setup) -> Iterator[Row]:
    """Answer requests with 0 to 3 images and different texts, whose images are encoded before."""
    num_requests, num_tokens = (2, 4) if setup.small else (16, 32)
    conversations = [setup.messages(i % 4, num_words=8 + 4 * i) for i in range(num_requests)]
    contenders = {"": (setup.model, setup.processor), "peer: ": (setup.peer, setup.peer_processor)}
    for name, (model, processor) in contenders.items():
        image_size = setup.config.image_size if model is setup.model else model.config.vision_config.image_size
        with torch.no_grad():
            output = model.get_image_features(setup.pixel_values(1, image_size), return_dict=True)
        (feature,) = output.pooler_output

        def prepared(
            conversations: list[Any], processor: Any = processor, feature: torch.Tensor = feature
        ) -> dict[str, Any]:
            num_images = sum(item["type"] == "image" for (turn,) in conversations for item in turn["content"])
            inputs = text_inputs(setup, processor, conversations)
            return with_features(inputs, feature, num_images) if num_images else inputs

        def answer(conversations: list[Any], model: PreTrainedModel = model, prepared: Any = prepared) -> torch.Tensor:
            return model.generate(**prepared(conversations), **settings(num_tokens))[:, -num_tokens:]

        def one_by_one(answer: Callable[[list[Any]], torch.Tensor] = answer) -> torch.Tensor:
            return torch.cat([answer([conversation]) for conversation in conversations])

        yield from compare(
            f"{name}{num_requests} requests in one batch",
            lambda answer=answer: answer(conversations),
            {"one by one": one_by_one},
            setup.repeats,
            "requests/s",
            num_requests,
        )
        if model is setup.model and find_spec("vllm"):
            yield from compare(
                f"{num_requests} requests in one batch",
                lambda answer=answer: answer(conversations),
                {"vllm": vllm(setup, conversations, num_tokens)},
                setup.repeats,
                "requests/s",
                num_requests,
                with_memory=False,  # vLLM runs in other processes
            )


def vllm(setup: Setup, conversations: list[list[dict[str, Any]]], num_tokens: int) -> Callable[[], None]:
    """Load the model in vLLM, which keeps encoded images, and return a function that answers the conversations."""
    os.environ["VLLM_WORKER_MULTIPROCESSING_METHOD"] = "spawn"  # PyTorch has started threads, which a fork lacks
    from vllm import LLM, SamplingParams

    options = {"model_impl": "transformers", "trust_remote_code": True, "limit_mm_per_prompt": {"image": 3}}
    options["enforce_eager"] = setup.device.type == "cpu"  # where compiling takes longer than the requests
    with tempfile.TemporaryDirectory() as directory:
        setup.model.save_pretrained(directory)
        setup.processor.save_pretrained(directory)
        llm = LLM(directory, dtype=setup.dtype, max_model_len=2048, kv_cache_memory_bytes=2**31, **options)
    prompts = [
        {"prompt": text, "multi_modal_data": {"image": [setup.image] * text.count(IMAGE_TOKEN)}}
        for text in setup.processor.apply_chat_template(conversations, add_generation_prompt=True)
    ]
    sampling = SamplingParams(temperature=0, max_tokens=num_tokens, min_tokens=num_tokens, ignore_eos=True)

    def work() -> None:
        llm.reset_prefix_cache()
        llm.generate(prompts, sampling, use_tqdm=False, tokenization_kwargs={"add_special_tokens": False})

    return work


def second_turn(setup: Setup) -> Iterator[Row]:
    """Answer a second question about an image, which the session has encoded for the first."""
    num_tokens = 4
    session = ChatSession(setup.model, setup.processor, [setup.image])
    session.answer("What is it?", generation_config=GenerationConfig(**settings(num_tokens)))
    history = session.messages
    conversation = [*history, {"role": "user", "content": [{"type": "text", "text": "Why?"}]}]
    language_model = causal_lm(setup.model)

    def ours() -> str:
        session.messages = history
        return session.answer("Why?", generation_config=GenerationConfig(**settings(num_tokens)))

    def original() -> str:
        inputs = setup.inputs(setup.processor, [conversation])
        with torch.no_grad():
            embeds = setup.original.embed(inputs["input_ids"], inputs["pixel_values"])
        output_ids = language_model.generate(
            inputs_embeds=embeds, attention_mask=inputs["attention_mask"], **settings(num_tokens)
        )
        return setup.processor.decode(output_ids[0], skip_special_tokens=True).strip()

    def peer() -> torch.Tensor:
        return setup.peer.generate(**setup.inputs(setup.peer_processor, [conversation]), **settings(num_tokens))

    yield from compare("second turn on the same image", ours, {"original": original, "peer": peer}, setup.repeats)
