# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Samples in LLaVA's and in chat format, and files of them."""

import json
from pathlib import Path
from typing import Any


def llava(question: str = "<image>\nWhat?", answer: str = "Red.", **keys: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **keys}


def chat(question: Any = "What?", answer: Any = "Red.", **keys: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **keys}


def write(directory: Path, samples: list[Any], name: str = "samples.json") -> Path:
    path = directory / name
    if name.endswith(".json"):
        path.write_text(json.dumps(samples), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(sample) + "\n" for sample in samples), encoding="utf-8")
    return path


def texts(messages: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Messages in short: an image as its size."""
    return [
        (m["role"], [i["text"] if i["type"] == "text" else "x".join(map(str, i["image"].size)) for i in m["content"]])
        for m in messages
    ]
