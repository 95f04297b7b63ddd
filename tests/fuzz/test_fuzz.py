# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""A small slice of `make fuzz`."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parts", "scale"), [(["images", "chats"], 0.01), (["files"], 0.02), (["kill", "full disk"], 0.04)]
)
def test_nothing_goes_wrong(parts, scale):
    command = [sys.executable, "-m", "tests.fuzz", *parts, "--scale", str(scale), "--seed", "1"]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
