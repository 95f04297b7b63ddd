# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Use of a model in applications: chat sessions, and an OpenAI-compatible server (`serving.server`)."""

from .chat import DECODING, ChatSession, load_image


__all__ = ["DECODING", "ChatSession", "load_image"]
