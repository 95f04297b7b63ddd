# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Rows of conversations in each form that users have them in, sound or not, and files of them."""

import json
from pathlib import Path
from typing import Any


def llava(question: str = "<image>\nWhat?", answer: str = "Red.", **keys: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **keys}


def chat(question: Any = "What?", answer: Any = "Red.", **keys: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **keys}


def write(folder: Path, rows: list[Any], name: str = "rows.json") -> Path:
    path = folder / name
    if name.endswith(".json"):
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
