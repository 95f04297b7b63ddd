# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Pictures and conversations become the model's inputs."""

from .chat_templates import CHAT_TEMPLATES, load_chat_template
from .processing_florence_vl import FlorenceVLProcessor


__all__ = ["CHAT_TEMPLATES", "FlorenceVLProcessor", "load_chat_template"]
