# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""The differences between the supported versions of Transformers, all of them, in this one place."""

import torch


try:
    from transformers.modeling_utils import slice_logits_to_keep
except ImportError:  # before 5.20

    def slice_logits_to_keep(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
        """Keep the positions that logits are wanted for: the last n (0 keeps all), or those of a tensor of indices."""
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return hidden_states[:, kept, :]


__all__ = ["slice_logits_to_keep"]
