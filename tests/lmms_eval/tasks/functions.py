# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Functions of the tasks."""

from typing import Any


def images(doc: dict[str, Any]) -> list[Any]:
    return doc["images"]


def target(doc: dict[str, Any]) -> int:
    return doc["choices"].index(doc["answer"])
