# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Florence-VL as a model of lmms-eval 0.7: answers of the chat interface, likelihoods of the simple one."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
# In place of the model's own settings of sampling. These are the defaults: generation warns about others.
GREEDY = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50, "max_length": None}

# lmms-eval adds this delimiter of examples to most tasks. As in its own models, it does not end an answer, which may
# have several paragraphs.
EXAMPLE_DELIMITER = "\n\n"


@dataclass(frozen=True)
class Question:
    """A request of lmms-eval. `messages` loads its images."""

    context: str
    messages: Callable[[], list[dict[str, Any]]]
    settings: dict[str, Any]
    target: str = ""


class _FlorenceVL(lmms):
    """What both interfaces share. The arguments are those of `--model_args`."""

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str = "auto",
        dtype: str = "auto",
        attn_implementation: str | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Load a converted, trained or original checkpoint.

        Args:
            pretrained (`str`): Directory or Hub id.
            batch_size (`int` or `str`, *optional*, defaults to 1): Number of questions per batch.
            device (`str`, *optional*, defaults to `"auto"`): As `device_map` in `from_pretrained`. Under
                `accelerate launch`, each process has the whole model on its own device.
            dtype, attn_implementation: As in `from_pretrained`.
            kwargs: Other arguments of `load_pretrained`, such as `vision_tower` and `chat_template`.
        """
        super().__init__()
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        kwargs["device_map"] = str(self.accelerator.device) if self.world_size > 1 else device
        kwargs["attn_implementation"] = attn_implementation
        model, self.processor = load_pretrained(pretrained, dtype=dtype, **kwargs)
        model.generation_config.update(**GREEDY)
        self.model = model.eval()
        self.device = model.device

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> "_FlorenceVL":
        """As in lmms-eval; `--model_args` take precedence over `--batch_size`, which is never absent, and `--device`."""
        options = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**options | simple_parse_args_string(arg_string))

    def _question(self, *request: Any) -> Question:
        raise NotImplementedError

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Generate one answer per request, up to the first of its stop strings."""
        return self._in_batches([self._question(*request.args) for request in requests], self._answers)

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("Tasks of several rounds are not supported; choose tasks of type `generate_until`.")

    def _in_batches(self, questions: list[Question], compute: Callable[[list[Question]], list[Any]]) -> list[Any]:
        """Compute results for batches of questions with equal settings and similar length, and restore their order."""
        collator = Collator(questions, lambda q: -len(q.context), group_fn=lambda q: q.settings, grouping=True)
        results: list[Any] = []
        with tqdm(total=len(questions), disable=self.rank != 0, desc="Florence-VL") as progress:
            for batch in collator.get_batched(n=self.batch_size):
                results += compute(batch)
                progress.update(len(batch))
        return collator.get_original(results)

    def _encode(self, conversations: list[list[dict[str, Any]]], **kwargs: Any) -> BatchFeature:
        """Return the inputs of the model, padded on the left."""
        for item in (item for messages in conversations for message in messages for item in message["content"]):
            if item["type"] == "text":
                # The images are content of their own.
                item["text"] = item["text"].replace(self.processor.image_token, "")
        padding = {"padding": True, "padding_side": "left"}
        encoded = self.processor.apply_chat_template(
            conversations, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=padding, **kwargs
        )
        return encoded.to(self.device, dtype=self.model.dtype)

    def _answers(self, questions: list[Question]) -> list[str]:
        inputs = self._encode([question.messages() for question in questions], add_generation_prompt=True)
        ids = self.model.generate(**inputs, **generation_settings(questions[0].settings))
        answers = self.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], **DECODING)
        for stop in stop_strings(questions[0].settings):
            answers = [answer.partition(stop)[0] for answer in answers]
        return answers


class FlorenceVLChat(_FlorenceVL):
    """The chat interface, for all tasks that generate answers."""

    is_simple = False

    def _question(  # type: ignore[override]  # requests of this interface
        self, context: str, doc_to_messages: Callable, settings: dict[str, Any], doc_id: int, task: str, split: str
    ) -> Question:
        def messages() -> list[dict[str, Any]]:
            doc = self.task_dict[task][split][doc_id]
            return ChatMessages(messages=doc_to_messages(doc)).to_hf_messages()

        return Question(context, messages, settings)

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        raise NotImplementedError("The chat interface has no likelihoods; run lmms-eval with --force_simple.")
