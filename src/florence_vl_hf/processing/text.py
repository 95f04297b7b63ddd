# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Text that tokenizers accept."""


def to_utf8(text: str) -> str:
    """Replace lone surrogates, which JSON can hold and UTF-8, and so the tokenizer, cannot."""
    return text if text.isascii() else text.encode("utf-8", errors="replace").decode("utf-8")


__all__ = ["to_utf8"]
