# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Settings that every configuration without sub-configurations has. Upstream does not check them for others."""

config_common_kwargs: dict = {}
