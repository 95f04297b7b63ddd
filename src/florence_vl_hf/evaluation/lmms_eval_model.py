# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Florence-VL as a model of lmms-eval: the chat interface generates answers, the simple one also scores given ones."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from lmms_eval.utils import Collator, simple_parse_args_string
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import BatchFeature

from ..conversion import load_pretrained
from ..serving import DECODING


# Of tasks that set none.
MAX_NEW_TOKENS = 1024

# What a task may set. Other keywords, such as `image_aspect_ratio`, are for other models.
SETTINGS = ("max_new_tokens", "min_new_tokens", "num_beams", "length_penalty", "repetition_penalty")
SAMPLING_SETTINGS = ("temperature", "top_p", "top_k", "min_p")

# lmms-eval adds this delimiter of examples to most tasks. As in its own models, it does not end an answer, which may
# have several paragraphs.
EXAMPLE_DELIMITER = "\n\n"


class FlorenceVLSimple(lmms):
    """
    The simple interface (`--force_simple`), which multiple choice by likelihood requires.

    The arguments are those of `--model_args`. `device` is the `device_map` of `from_pretrained`; under `accelerate
    launch`, each process has the whole model on its own device. `kwargs` are arguments of `load_pretrained`.
    """

    is_simple = True

    def __init__(
        self, pretrained: str, batch_size: int | str = 1, device: str = "auto", dtype: str = "auto", **kwargs: Any
    ) -> None:
        super().__init__()
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        device_map = str(self.accelerator.device) if self.world_size > 1 else device
        model, self.processor = load_pretrained(pretrained, dtype=dtype, device_map=device_map, **kwargs)
        model.generation_config.max_length = None  # Generation warns about it beside `max_new_tokens`.
        self.model = model.eval()
        self.device = model.device

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Any:
        """As in lmms-eval. `--model_args` override `--batch_size` and `--device`, which may be defaults."""
        options = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**options | simple_parse_args_string(arg_string))

    def _messages(self, context: str, doc_to_visual: Callable, doc: Any) -> list[dict[str, Any]]:
        content = [{"type": "image", "image": image} for image in doc_to_visual(doc) or []]
        return [{"role": "user", "content": [*content, {"type": "text", "text": context}]}]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Generate one answer per request, up to the first of its stop strings."""
        order = (0, 1, 2, 3, 4, 5) if self.is_simple else (0, 2, 1, 3, 4, 5)
        return self._in_batches([tuple(request.args[i] for i in order) for request in requests], self._answers, True)

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("Tasks of several rounds are not supported; choose tasks of type `generate_until`.")

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """
        Return pairs of the mean loss of an answer (`float`), and whether it is the greedy one (`bool`).

        As in training, its end-of-turn token is part of it. lmms-eval chooses the answer with the lowest loss.
        """
        return self._in_batches([request.args for request in requests], self._losses, grouping=False)

    def _in_batches(self, requests: list[tuple], compute: Callable[[list[tuple]], list[Any]], grouping: bool) -> Any:
        """Compute results for batches of similar length, with `grouping` of equal settings, and restore the order."""
        collator = Collator(requests, lambda request: -len(request[0]), lambda request: request[1], grouping=grouping)
        progress = tqdm(list(collator.get_batched(n=self.batch_size)), disable=self.rank != 0, desc="Batches")
        return collator.get_original([result for batch in progress for result in compute(batch)])

    def _encode(self, requests: list[tuple], with_answers: bool) -> BatchFeature:
        """Return the inputs of the model, padded on the left. Answers have a mask."""
        conversations = []
        for context, given, load, doc_id, task, split in requests:
            doc = self.task_dict[task][split][doc_id]
            messages = self._messages(context, load, doc)
            if with_answers:
                answer = (given(doc) if callable(given) else given).strip()
                messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
            for item in (item for message in messages for item in message["content"] if item["type"] == "text"):
                # The images are content of their own.
                item["text"] = item["text"].replace(self.processor.image_token, "")
            conversations.append(messages)
        encoded = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=not with_answers,
            return_assistant_tokens_mask=with_answers,
            processor_kwargs={"padding": True, "padding_side": "left"},
        )
        return encoded.to(self.device, dtype=self.model.dtype)

    def _answers(self, requests: list[tuple]) -> list[str]:
        settings = requests[0][1]
        inputs = self._encode(requests, with_answers=False)
        ids = self.model.generate(**inputs, **generation_settings(settings))
        answers = self.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], **DECODING)
        for stop in stop_strings(settings):
            answers = [answer.partition(stop)[0] for answer in answers]
        return answers

    @torch.inference_mode()
    def _losses(self, requests: list[tuple]) -> list[GenerationResult]:
        inputs = self._encode(requests, with_answers=True)
        is_answer = inputs.pop("assistant_masks").bool()  # (batch_size, length)
        if not is_answer.any(dim=1).all():
            raise ValueError("The chat template does not mark answers with `{% generation %}`; give another one.")
        start = int(is_answer.any(dim=0).int().argmax())
        is_answer, labels = is_answer[:, start:], inputs["input_ids"][:, start:]
        # A token is predicted at the position before it.
        logits = self.model(**inputs, logits_to_keep=labels.shape[1] + 1).logits[:, :-1].float()
        losses = cross_entropy(logits.transpose(1, 2), labels, reduction="none") * is_answer
        means = losses.sum(dim=1) / is_answer.sum(dim=1)
        is_greedy = ((logits.argmax(dim=-1) == labels) | ~is_answer).all(dim=1)
        # A bare pair would become a string.
        return [GenerationResult(pair) for pair in zip(means.tolist(), is_greedy.tolist(), strict=True)]


class FlorenceVLChat(FlorenceVLSimple):
    """The chat interface, the default of lmms-eval: all tasks that generate answers."""

    is_simple = False

    def _messages(self, context: str, doc_to_messages: Callable, doc: Any) -> list[dict[str, Any]]:
        return ChatMessages(messages=doc_to_messages(doc)).to_hf_messages()


def generation_settings(given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `generate` for the settings of a task. Zero and `None` mean the default."""
    do_sample = given.get("temperature") != 0 and bool(given.get("do_sample", given.get("temperature")))
    names = SETTINGS + (SAMPLING_SETTINGS if do_sample else ())
    settings = {name: given[name] for name in names if given.get(name)}
    return {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": do_sample} | settings


def stop_strings(given: dict[str, Any]) -> list[str]:
    """Return the strings that end an answer."""
    until = given.get("until") or []
    return [stop for stop in ([until] if isinstance(until, str) else until) if stop not in ("", EXAMPLE_DELIMITER)]


__all__ = ["FlorenceVLChat", "FlorenceVLSimple"]
