# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Differences between the supported versions of Transformers."""

from dataclasses import fields

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast


try:
    from transformers.modeling_utils import slice_logits_to_keep
except ImportError:  # before 5.20

    def slice_logits_to_keep(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
        """Keep the positions whose logits are computed: the last n (0 keeps all), or those of a tensor of indices."""
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return hidden_states[:, kept, :]


# The name of keys and values of earlier tokens in the inputs and outputs of models: renamed in 5.24.
CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"


__all__ = ["CACHE", "slice_logits_to_keep"]
