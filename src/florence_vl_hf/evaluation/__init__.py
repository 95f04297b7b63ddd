# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Evaluation: benchmarks with lmms-eval."""
