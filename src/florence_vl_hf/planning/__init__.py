# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""TEMP: the old modules under the new interface."""

from ..training.memory import MemoryPlan, TrainingSetup, plan_memory
from ..training.memory_report import format_plan, format_table, plan_known_runs, published_config, read_setup


__all__ = [
    "MemoryPlan",
    "TrainingSetup",
    "format_plan",
    "format_table",
    "plan_known_runs",
    "plan_memory",
    "published_config",
    "read_setup",
]
