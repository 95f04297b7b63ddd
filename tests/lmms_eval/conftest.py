# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Tests of the plug-in for lmms-eval, which `make test-lmms-eval` runs in an environment of its own."""

import os
from importlib.util import find_spec


# Tasks with a judge create its client when they are read. No test asks it.
os.environ.setdefault("OPENAI_API_KEY", "none")

collect_ignore_glob = [] if find_spec("lmms_eval") else ["test_*.py"]
