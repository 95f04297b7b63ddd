# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Speed and memory of Florence-VL at real sizes with random weights, as ratios to baselines of the same run."""
