# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Of the tasks beside."""

from typing import Any


def images(doc: dict[str, Any]) -> list[Any]:
    return doc["images"]
