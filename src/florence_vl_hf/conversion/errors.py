# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""What goes wrong with a checkpoint."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be converted. The message says what came, what was expected and what to do."""


__all__ = ["CheckpointError"]
