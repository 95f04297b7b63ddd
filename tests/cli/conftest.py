# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import subprocess
import sys
from pathlib import Path


def run(*arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess:
    """Run `florence-vl` in a process of its own."""
    command = [sys.executable, "-m", "florence_vl_hf", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=300)
