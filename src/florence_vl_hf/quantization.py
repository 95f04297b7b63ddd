# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Quantization of the language model, for inference and below adapters. Everything else keeps its dtype."""

import torch
from transformers import BitsAndBytesConfig, QuantoConfig, TorchAoConfig
from transformers.utils.quantization_config import QuantizationConfigMixin


# Everything except the language model, in the model with a head and in the one without.
MODULES_TO_NOT_CONVERT = [
    "lm_head",
    "vision_tower",
    "multi_modal_projector",
    "model.vision_tower",
    "model.multi_modal_projector",
]


def quantization_config(
    bits: int,
    compute_dtype: torch.dtype = torch.bfloat16,
    backend: str = "bitsandbytes",
    floating_point: bool = False,
) -> QuantizationConfigMixin:
    """
    Configure a backend to quantize only the language model, not the vision tower, the projector or the head.

    Args:
        bits (`int`): Bits per weight. bitsandbytes has 4, as in QLoRA (NF4 with double quantization), and 8
            (LLM.int8); torchao and quanto have 8.
        compute_dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`): dtype that 4-bit layers of
            bitsandbytes compute in. All others compute in the dtype of the model.
        backend (`str`, *optional*, defaults to `"bitsandbytes"`): `"bitsandbytes"`, `"torchao"` or `"quanto"`.
        floating_point (`bool`, *optional*, defaults to `False`): Whether weights of torchao and quanto are float8
            (e4m3) instead of int8.

    Returns:
        `QuantizationConfigMixin`: The `quantization_config` of `from_pretrained`.

    Raises:
        ValueError: If the backend has no weights of this kind.
        ImportError: If torchao is not installed. `from_pretrained` looks for the other backends.
    """
    kind = f"{'float' if floating_point else 'int'}{bits}"
    match backend, kind:
        case "bitsandbytes", "int4" | "int8":
            return BitsAndBytesConfig(
                load_in_4bit=bits == 4,
                load_in_8bit=bits == 8,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=compute_dtype,
                llm_int8_skip_modules=list(MODULES_TO_NOT_CONVERT),
            )
        case "torchao", "int8" | "float8":
            from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

            weights = Float8WeightOnlyConfig() if floating_point else Int8WeightOnlyConfig()
            return TorchAoConfig(weights, modules_to_not_convert=list(MODULES_TO_NOT_CONVERT))
        case "quanto", "int8" | "float8":
            return QuantoConfig(kind, modules_to_not_convert=list(MODULES_TO_NOT_CONVERT))
    raise ValueError(
        f"Got {kind} weights of {backend!r}, expected int4 or int8 of 'bitsandbytes', or int8 or float8 of 'torchao' "
        f"or 'quanto'."
    )
