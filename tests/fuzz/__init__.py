# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Random inputs with fixed seeds: `python -m tests.fuzz`, or `make fuzz`."""
