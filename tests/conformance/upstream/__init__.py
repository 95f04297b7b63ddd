# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""
Transformers' own tests, as its source distribution has them, and stand-ins for the modules that it lacks.

`make conformance` downloads them. Modules of this directory come first.
"""

import sys
from pathlib import Path

import pytest

from ..fetch import RELEASE, UPSTREAM


if not UPSTREAM.is_dir():
    pytest.skip(f"The tests of {RELEASE} are not there; run `make conformance`.", allow_module_level=True)

__path__.append(str(UPSTREAM / "tests"))
# Where upstream imports `fetch_hub_objects_for_ci` from.
sys.path.append(str(Path(__file__).parent / "utils"))
