# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""TRL's trainer with model and processor of the package, all unchanged."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

from florence_vl_hf import FlorenceVLForConditionalGeneration, FlorenceVLProcessor
from florence_vl_hf.training.adapters import lora_target_modules, merge_adapter


def colored_image(color: str) -> Image.Image:
    return Image.new("RGB", (64, 64), color)


def text(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


# One image and several turns, two images, and none, with texts of different length.
CONVERSATIONS = [
    (
        [
            text("user", "What is this?"),
            text("assistant", "A red square."),
            text("user", "Sure?"),
            text("assistant", "Yes."),
        ],
        [colored_image("red")],
    ),
    (
        [text("user", "Which is blue?"), text("assistant", "The second one.")],
        [colored_image("red"), colored_image("blue")],
    ),
    ([text("user", "Are you sure?"), text("assistant", "I am.")], []),
]


def samples(form: str) -> Dataset:
    """The conversations in one of the formats that TRL reads."""
    made = []
    for messages, images in CONVERSATIONS:
        if form == "messages":
            made.append({"messages": messages, "images": images})
        elif form == "content":
            marked = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in messages]
            marked[0]["content"] = [{"type": "image", "text": None}] * len(images) + marked[0]["content"]
            made.append({"messages": marked, "images": images})
        else:
            made.append({"prompt": messages[:-1], "completion": messages[-1:], "images": images})
    return Dataset.from_list(made)


def expected_ids(
    processor: FlorenceVLProcessor, conversation: tuple[list[dict[str, Any]], list[Image.Image]], only_last: bool
) -> tuple[list[int], list[int]]:
    """
    Token ids of a conversation, and its labels by the assistant mask of the processor.

    Of prompt and completion, TRL trains on the completion, and tokenizes it separately: SentencePiece tokenizers then
    add a space before it, which the conversation does not have.
    """
    messages, images = conversation
    content = [{"type": "image", "image": image} for image in images]
    filled = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    filled[0]["content"] = [*content, *filled[0]["content"]]
    made = processor.apply_chat_template(filled, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids, learned = list(made["input_ids"][0]), [bool(s) for s in made["assistant_masks"][0]]
    if only_last:
        start = max(i for i in range(1, len(learned)) if learned[i] and not learned[i - 1])
        alone = processor.tokenizer(processor.decode(ids[start:]), add_special_tokens=False)["input_ids"]
        ids, learned = ids[:start] + alone, [False] * start + [True] * len(alone)
    return ids, [token if s else -100 for token, s in zip(ids, learned, strict=True)]


@pytest.fixture
def model(converted: Path) -> FlorenceVLForConditionalGeneration:
    return AutoModelForImageTextToText.from_pretrained(converted, dtype=torch.float32)


def make_trainer(
    model: FlorenceVLForConditionalGeneration,
    processor: FlorenceVLProcessor,
    dataset: Dataset,
    output: Path,
    peft_config: LoraConfig | None = None,
    **settings: Any,
) -> SFTTrainer:
    arguments = SFTConfig(
        output,
        use_cpu=True,
        bf16=False,
        max_length=None,
        max_steps=5,
        per_device_train_batch_size=2,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    return SFTTrainer(model, arguments, processing_class=processor, train_dataset=dataset, peft_config=peft_config)


FORMS = {
    "messages": {"assistant_only_loss": True},
    "content": {"assistant_only_loss": True},
    "prompt": {},
}


@pytest.mark.parametrize("form", FORMS)
def test_labels_are_the_turns_of_the_assistant(form, model, processor, tmp_path):
    dataset = samples(form)
    trainer = make_trainer(model, processor, dataset, tmp_path, **FORMS[form])
    batch = trainer.data_collator([dataset[i] for i in range(3)])
    assert batch["pixel_values"].shape[0] == 3
    for row, conversation in enumerate(CONVERSATIONS):
        ids, labels = expected_ids(processor, conversation, only_last=form == "prompt")
        length = len(ids)
        assert batch["input_ids"][row, :length].tolist() == ids
        assert batch["labels"][row, :length].tolist() == labels
        assert any(label != -100 for label in labels)
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (batch["labels"].shape[1] - length)
        assert (batch["labels"][row, length:] == -100).all()


def test_without_a_mask_the_prompt_is_learned_too(model, processor, tmp_path):
    """The default of TRL with `messages`, which the documentation warns of."""
    dataset = samples("messages")
    batch = make_trainer(model, processor, dataset, tmp_path).data_collator([dataset[0]])
    assert torch.equal(batch["labels"], batch["input_ids"])


@pytest.mark.parametrize("form", ["messages", "prompt"])
def test_samples_without_a_column_of_images(form, model, processor, tmp_path):
    """TRL then tokenizes as for language models, when the trainer is created."""
    conversation = CONVERSATIONS[2]
    dataset = samples(form).select([2]).remove_columns("images")
    trainer = make_trainer(model, processor, dataset, tmp_path, **FORMS[form])
    ids, labels = expected_ids(processor, conversation, only_last=False)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    assert batch["input_ids"][0].tolist() == ids
    assert batch["labels"][0].tolist() == labels


@pytest.mark.slow
@pytest.mark.parametrize(("form", "with_lora"), [("messages", False), ("prompt", False), ("content", True)])
def test_learns_and_saves(form, with_lora, model, processor, converted, tmp_path):
    dataset = samples(form).select([1, 1])
    peft_config = None
    if with_lora:
        peft_config = LoraConfig(r=8, lora_alpha=16, target_modules=lora_target_modules(model))
    output = tmp_path / "trained"
    trainer = make_trainer(model, processor, dataset, output, peft_config, **FORMS[form])
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert all(".lora_" in name for name in before) == with_lora
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 5 and all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0] - (0.05 if with_lora else 1)

    trainer.save_model(output)
    trained = trainer.model.state_dict()
    assert any(not torch.equal(trained[name], old) for name, old in before.items())
    assert type(AutoProcessor.from_pretrained(output)) is FlorenceVLProcessor
    if with_lora:
        plain = AutoModelForImageTextToText.from_pretrained(converted, dtype=torch.float32)
        loaded = PeftModel.from_pretrained(plain, output).state_dict()
    else:
        loaded = AutoModelForImageTextToText.from_pretrained(output).state_dict()
    assert loaded.keys() == trained.keys()
    assert all(torch.equal(loaded[name], trained[name]) for name in trained)
    if with_lora:
        merge_adapter(output, tmp_path / "merged")
        assert type(AutoProcessor.from_pretrained(tmp_path / "merged")) is FlorenceVLProcessor
        AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
