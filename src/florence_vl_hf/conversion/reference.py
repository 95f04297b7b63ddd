# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""TEMP: name of the new module, until it is merged."""

from pathlib import Path


RECORD_SCRIPT = Path(__file__).with_name("record_reference.py")
