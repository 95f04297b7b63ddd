# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""vLLM against Transformers: `make test-vllm`. vLLM's environment lacks this package and what other tests import."""

from pathlib import Path


FIXTURES = Path(__file__).parents[1] / "fixtures"
# Written by make_models.py in the environment of all tests, read by test_vllm.py in vLLM's.
MODELS = Path(__file__).parents[2] / ".cache" / "vllm"
NUM_TOKENS = 12
