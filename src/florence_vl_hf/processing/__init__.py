# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Inputs of the model: the processor and the chat templates."""

from .chat_templates import CHAT_TEMPLATES, load_chat_template
from .processing_florence_vl import IMAGE_TOKEN, FlorenceVLProcessor


__all__ = ["CHAT_TEMPLATES", "IMAGE_TOKEN", "FlorenceVLProcessor", "load_chat_template"]
