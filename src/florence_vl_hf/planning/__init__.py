# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Memory per GPU of a training run, planned before there is a GPU."""

from .memory import (
    MemoryPlan,
    TrainingSetup,
    format_plan,
    format_table,
    plan_known_runs,
    plan_memory,
    published_config,
    read_setup,
)


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
