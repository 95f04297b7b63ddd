# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Conversations of all kinds, right and broken: the collator and `check-data` agree on which are broken."""

import json
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from florence_vl_hf import FlorenceVLProcessor
from florence_vl_hf.processing import IMAGE_TOKEN
from florence_vl_hf.training import FlorenceVLCollator, SampleError, load_conversations
from florence_vl_hf.training.check_data import check_data

from .harness import MAX_SECONDS, time_limit


# Conversations of one case: reading a file costs more than a sample.
SAMPLES_PER_CASE = 20
MAX_LENGTH = 200

TEXTS = ["What?", "", " ", "\n", IMAGE_TOKEN, f"{IMAGE_TOKEN}\nhi", "<im", "age>", "<im<image>age>", "\ud800", "\0"]
TEXTS += [
    "<s>",
    "</s>",
    "<|end|>",
    "<|eot_id|>",
    "<pad>",
    "{{ messages }}",
    "{% raw %}",
    "é" * 50,
    "🙂",
    "\u202e",
    "a" * 3000,
]
VALUES: list[Any] = [None, 0, -1, 1e308, float("nan"), True, "", "x", [], {}, [[]], {"a": 1}, 10**400, ["human"]]


def check(random: Random, directory: Path, processor: FlorenceVLProcessor) -> str:
    images = directory / "images"
    images.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (9, 7), "red").save(images / name)
    (images / "broken.png").write_bytes(b"no image")
    samples = [_sample(random) for _ in range(SAMPLES_PER_CASE)]
    file = directory / "data.jsonl"
    file.write_text("".join(json.dumps(sample) + "\n" for sample in samples))

    with time_limit(3 * MAX_SECONDS):
        dataset = load_conversations(str(file), str(images))
        if len(dataset) != len(samples):
            return f"{len(dataset)} of {len(samples)} samples"
        broken = 0
        for i, sample in enumerate(dataset):
            strict = FlorenceVLCollator(processor, MAX_LENGTH, on_error="raise")
            lenient = FlorenceVLCollator(processor, MAX_LENGTH, on_error="skip")
            skipped = lenient([sample])
            try:
                batch = strict([sample])
            except SampleError as error:
                broken += 1
                if "\n" in str(error) or lenient.num_skipped != 1 or (skipped["labels"] != -100).any():
                    return f"sample {i} is not skipped as it should: {error}"
                continue
            if problem := _check_batch(batch, processor) or ("skipped" if lenient.num_skipped else ""):
                return f"sample {i}: {problem}"
            if not (batch["labels"] != -100).any():
                return f"sample {i} has nothing to learn"
        report = check_data(dataset, processor, max_length=MAX_LENGTH, num_workers=0)
        found = report.num_broken
        return "" if found == broken else f"check-data finds {found} unusable samples, the collator {broken}"


def _check_batch(batch: dict[str, Any], processor: FlorenceVLProcessor) -> str:
    ids, labels = batch["input_ids"], batch["labels"]
    if not ids.shape == labels.shape == batch["attention_mask"].shape or ids.shape[1] > MAX_LENGTH:
        return f"shapes {tuple(ids.shape)}, {tuple(labels.shape)}"
    if (labels[labels != -100] != ids[labels != -100]).any():
        return "labels that are not the token ids"
    num_images = len(batch.get("pixel_values", ()))
    num_tokens = int((ids == processor.image_token_id).sum())
    expected = num_images * processor.num_image_tokens
    return "" if num_tokens == expected else f"{num_tokens} image tokens for {num_images} images"


def _text(random: Random) -> str:
    return "".join(random.choice(TEXTS) for _ in range(random.choice([1, 1, 1, 2, 5])))


def _sample(random: Random) -> Any:
    """A right sample, in LLaVA's or chat format, into which up to three random changes are made."""
    num_images, is_llava = random.choice([0, 0, 1, 1, 2, 3]), random.random() < 0.5
    turns: list[dict[str, Any]] = []
    for i in range(random.choice([1, 1, 2, 4])):
        question = IMAGE_TOKEN * (num_images if i == 0 else 0) + "What is it?"
        for ours, theirs, text in (("user", "human", question), ("assistant", "gpt", _text(random) or "It.")):
            if is_llava:
                turns.append({"from": theirs, "value": text})
            elif random.random() < 0.5:
                turns.append({"role": ours, "content": text})
            else:
                images = [{"type": "image"}] * text.count(IMAGE_TOKEN)
                turns.append(
                    {"role": ours, "content": [*images, {"type": "text", "text": text.replace(IMAGE_TOKEN, "")}]}
                )
    names = [random.choice(["a.png", "b.png"]) for _ in range(num_images)]
    sample: dict[str, Any] = {"id": random.choice(["1", 1, "ü"]), "conversations" if is_llava else "messages": turns}
    if names:
        sample["image" if is_llava else "images"] = names[0] if is_llava and len(names) == 1 else names
    for _ in range(random.choice([0, 0, 1, 1, 2, 3])):
        sample = _change(random, sample)
    return sample


def _change(random: Random, value: Any) -> Any:
    """Change one random place in a value made of lists and dicts."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        key = random.choice(list(value))
        action = random.randrange(10)
        if action == 0:
            return {k: v for k, v in value.items() if k != key}
        if action == 1:
            return {(random.choice(["role", "from", "x", "images"]) if k == key else k): v for k, v in value.items()}
        return value | {key: _change(random, value[key])}
    if isinstance(value, list) and value and random.random() < 0.9:
        i = random.randrange(len(value))
        action = random.randrange(6)
        if action == 0:
            return value[:i] + value[i + 1 :]
        if action == 1:
            return value + [value[i]]
        return [*value[:i], _change(random, value[i]), *value[i + 1 :]]
    if isinstance(value, str) and random.random() < 0.6:
        paths = ["../a.png", "/etc/passwd", "broken.png", "missing.png", ".", "a\0.png"]
        return random.choice([_text(random), *paths, "user", "assistant", "system", "gpt", "tool"])
    return random.choice(VALUES)
