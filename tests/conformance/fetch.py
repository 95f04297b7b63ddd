# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""
Download the tests in the source distribution of the installed Transformers, which its wheel lacks.

`python -m tests.conformance.fetch` keeps them in `.cache/`, by version. pip's own configuration says from where.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path


RELEASE = f"transformers-{version('transformers')}"
CACHE = Path(__file__).parents[2] / ".cache"
UPSTREAM = CACHE / RELEASE

# What upstream's modules read while they are imported, and the sdist lacks.
PLACEHOLDERS = {
    # Executed in place of Transformers itself, which is imported already.
    "tests/__init__.py": "",
    "src/transformers/__init__.py": "",
    # The tiny models on the Hub, by class.
    "tests/utils/tiny_model_summary.json": "{}",
}


def fetch() -> None:
    """Download and unpack the tests, unless they are there. Whoever is interrupted leaves no part of them behind."""
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        # Transformers' metadata is built by setuptools alone, so no isolated environment has to be installed.
        options = ["--no-deps", "--no-binary", "transformers", "--no-build-isolation", "--dest", work]
        command = [sys.executable, "-m", "pip", "download", *options, RELEASE.replace("-", "==", 1)]
        pip = subprocess.run(command, capture_output=True, text=True)
        if pip.returncode:
            lines = pip.stderr.splitlines()
            reason = [line for line in lines if line.lower().startswith("error:")] or lines
            sys.exit(f"Could not download the source distribution of {RELEASE} with pip: {reason[-1]}")
        with tarfile.open(Path(work) / f"{RELEASE}.tar.gz") as sdist:
            tests = [member for member in sdist if member.name.startswith(f"{RELEASE}/tests/")]
            sdist.extractall(work, tests, filter="data")
        unpacked = Path(work) / RELEASE
        for name, text in PLACEHOLDERS.items():
            (unpacked / name).parent.mkdir(parents=True, exist_ok=True)
            (unpacked / name).write_text(text, encoding="utf-8")
        os.rename(unpacked, UPSTREAM)


if __name__ == "__main__":
    if not UPSTREAM.is_dir():
        fetch()
