# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Entry point of lmms-eval, which reads it at every start: `lmms-eval --model florence_vl`."""

from lmms_eval.models.registry_v2 import ModelManifest


MODULE = "florence_vl_hf.evaluation.lmms_eval_model"
manifest = ModelManifest("florence_vl", f"{MODULE}.FlorenceVLSimple", f"{MODULE}.FlorenceVLChat")

__all__ = ["manifest"]
