# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""What a conversion will write, before it writes anything."""

from dataclasses import dataclass

import torch
from transformers import GenerationConfig

from ..modeling import FlorenceVLConfig
from ..processing import FlorenceVLProcessor
from .output_folder import TensorToWrite
from .stored_tensors import StoredTensor


@dataclass(frozen=True, kw_only=True)
class PlannedTensor(TensorToWrite):
    """A tensor of the output, and the stored one that it is made of."""

    stored: StoredTensor
    transposed: bool


@dataclass
class ConversionPlan:
    """A conversion that was checked from end to end, but wrote nothing yet."""

    config: FlorenceVLConfig
    processor: FlorenceVLProcessor
    generation_config: GenerationConfig
    tensors: dict[str, PlannedTensor]
    assumptions: list[str]
    unused: list[str]
    chat_template: str

    @property
    def num_parameters(self) -> int:
        return sum(torch.Size(tensor.shape).numel() for tensor in self.tensors.values())


__all__ = ["ConversionPlan", "PlannedTensor"]
