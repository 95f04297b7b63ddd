# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""The differences between the supported versions of Transformers, all of them, in this one place."""

import torch
from transformers import PreTrainedModel


try:
    from transformers.modeling_utils import slice_logits_to_keep
except ImportError:  # before 5.20

    def slice_logits_to_keep(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
        """Keep the positions that logits are wanted for: the last n (0 keeps all), or those of a tensor of indices."""
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return hidden_states[:, kept, :]


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Keep one state per layer for the backward pass, and recompute the rest."""
    # Renamed in 5.23.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


__all__ = ["enable_checkpointing", "slice_logits_to_keep"]
