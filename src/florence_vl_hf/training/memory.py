# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Memory per GPU of a training run, from the configuration alone.

What lasts (weights, gradients, optimizer) is counted from the shapes of the parameters and from who shards what. What
comes and goes (activations, what is recomputed, the logits) is not put into formulas, which would have to follow every
language model: one step of the model's own code runs on tensors without data, and the bytes alive are watched.
"""

import copy
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft import get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..modeling import FlorenceVLConfig, FlorenceVLForConditionalGeneration
from ..modeling.transformers_compat import enable_checkpointing
from .adapters import lora_config
from .stages import PARTS, STAGES, part_of, set_trainable
from .step_trace import GRADIENTS, trace_step


GIB = 2**30
Sharding = Literal["none", "ddp", "zero2", "zero3", "fsdp2"]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# Terms that several places name.
WEIGHTS, OPTIMIZER = "weights", "optimizer"

# DeepSpeed's defaults (deepspeed/runtime/zero/config.py), in elements.
ZERO_BUCKET = 500_000_000  # reduce_bucket_size
ZERO3_LIVE_PARAMETERS = 1_000_000_000  # stage3_max_live_parameters, prefetched ones among them
ZERO3_SUB_GROUP = 1_000_000_000  # sub_group_size: what the optimizer steps at once

# Bytes per weight of bitsandbytes. NF4: half a byte, one 8-bit constant per 64 weights, a float32 per 256 constants.
# LLM.int8: a byte, and one float32 per row, which is left out.
QUANTIZED_BYTES = {4: 0.5 + 1 / 64 + 4 / (64 * 256), 8: 1.0}


@dataclass(frozen=True)
class TrainingSetup:
    """
    What a training run's memory depends on, beside the model.

    Args:
        stage (`str`, *optional*, defaults to `"finetune"`): Which parts are trained, as in `set_trainable`.
        batch_size (`int`, *optional*, defaults to 1): Samples per GPU.
        max_length (`int`, *optional*, defaults to 2048): Positions per sample, image tokens included.
        images_per_sample (`int`, *optional*, defaults to 1): Pictures in each sample.
        num_gpus (`int`, *optional*, defaults to 1): GPUs that share what is sharded.
        sharding (`str`, *optional*, defaults to `"none"`): `none`, `ddp`, `zero2`, `zero3` or `fsdp2`.
        dtype (`str`, *optional*, defaults to `"bfloat16"`): What the weights are loaded in.
        mixed_precision (`bool`, *optional*, defaults to `True`): Trainer's `bf16` or `fp16`.
        gradient_checkpointing (`bool`, *optional*, defaults to `True`): Keep one state per layer, recompute the rest.
        gradient_accumulation_steps (`int`, *optional*, defaults to 1): If several, gradients live through the forward.
        lora_rank (`int`, *optional*): Train LoRA of this rank on the language model, instead of the stage's parts.
        bits (`int`, *optional*): 4 or 8, of a quantized language model.
        attention (`str`, *optional*, defaults to `"sdpa"`): `sdpa`, fused, or `eager`, which holds the scores.
    """

    stage: str = "finetune"
    batch_size: int = 1
    max_length: int = 2048
    images_per_sample: int = 1
    num_gpus: int = 1
    sharding: Sharding = "none"
    dtype: str = "bfloat16"
    mixed_precision: bool = True
    gradient_checkpointing: bool = True
    gradient_accumulation_steps: int = 1
    lora_rank: int | None = None
    bits: int | None = None
    attention: str = "sdpa"

    def __post_init__(self) -> None:
        if self.sharding not in ("none", "ddp", "zero2", "zero3", "fsdp2"):
            raise ValueError(f"`sharding` is {self.sharding!r}; give none, ddp, zero2, zero3 or fsdp2.")
        if self.dtype not in DTYPES:
            raise ValueError(f"`dtype` is {self.dtype!r}; give one of {', '.join(DTYPES)}.")
        if self.bits is not None and (self.bits not in QUANTIZED_BYTES or self.lora_rank is None):
            raise ValueError(
                f"`bits` is {self.bits} and `lora_rank` {self.lora_rank}; a quantized model, of 4 or 8 bits, is "
                f"trained through LoRA."
            )
        for name in ("batch_size", "max_length", "num_gpus", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; give at least 1.")

    @property
    def is_deepspeed(self) -> bool:
        return self.sharding in ("zero2", "zero3")

    @property
    def uses_autocast(self) -> bool:
        """DeepSpeed casts the model itself; everywhere else accelerate runs its forward under autocast."""
        return self.mixed_precision and not self.is_deepspeed

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of the weights as the layers see them."""
        if self.mixed_precision and self.sharding in ("zero2", "zero3", "fsdp2"):
            return torch.bfloat16
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class MemoryPlan:
    """
    Bytes per GPU at the peak.

    Args:
        setup (`TrainingSetup`): What was planned for.
        num_parameters (`dict[str, tuple[int, int]]`): Of each part of the model, how many there are and are trained.
        terms (`dict[str, int]`): Bytes by what they hold, at the moment when their sum is largest.
        peak (`str`): That moment: `forward`, `backward` or `optimizer step`.
    """

    setup: TrainingSetup
    num_parameters: dict[str, tuple[int, int]]
    terms: dict[str, int] = field(default_factory=dict)
    peak: str = "backward"

    @property
    def total(self) -> int:
        """All bytes at the peak."""
        return sum(self.terms.values())

    def fits(self, gib: float, margin: float = 0.1) -> bool:
        """Whether a GPU of so many GiB has room, with a share of it left for what is not counted."""
        return self.total <= gib * GIB * (1 - margin)


def plan_memory(config: FlorenceVLConfig, setup: TrainingSetup | None = None, **settings: Any) -> MemoryPlan:
    """
    Plan a training run's memory. Nothing is loaded, and nothing of the model's size is allocated.

    Args:
        config (`FlorenceVLConfig`): The model.
        setup (`TrainingSetup`, *optional*): The run.
        settings: The run's settings one by one, instead of `setup`.

    Raises:
        ValueError: If a setting is none that training has, or the pictures do not fit `max_length`.
    """
    setup = setup or TrainingSetup(**settings)
    num_image_tokens = setup.images_per_sample * config.num_image_tokens
    if num_image_tokens > setup.max_length:
        raise ValueError(
            f"{setup.images_per_sample} pictures per sample take {num_image_tokens} positions, but `max_length` is "
            f"{setup.max_length}; raise it."
        )
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = _build(config, setup)
    with fake_mode:
        _materialize(model)
    lasting = _lasting_terms(model, setup)
    gradients = _gradient_bytes(model, setup)

    in_step = {**lasting, GRADIENTS: gradients}
    if setup.is_deepspeed:
        # The update is done in float32: so are its gradients, one sub-group at a time with ZeRO-3.
        elements = _share(_num_trained(model), setup)
        in_step["gradients in float32"] = 4 * (
            min(elements, ZERO3_SUB_GROUP) if setup.sharding == "zero3" else elements
        )

    # With one batch per step gradients grow as activations shrink. Else they are there from the first batch on, and
    # ZeRO-3 keeps a buffer for them all the time.
    are_lasting = setup.gradient_accumulation_steps > 1 or setup.sharding == "zero3"
    with fake_mode:
        live, phase = trace_step(
            model,
            batch_shape=(setup.batch_size, setup.max_length),
            num_images=setup.batch_size * setup.images_per_sample,
            gradient_share=0.0 if are_lasting else gradients / _bytes_of_trained(model),
            autocast=setup.uses_autocast,
        )
    in_passes = {**lasting, **live}
    if are_lasting:
        in_passes[GRADIENTS] = gradients

    if sum(in_step.values()) > sum(in_passes.values()):
        in_passes, phase = in_step, "optimizer step"
    terms = {name: round(size) for name, size in in_passes.items() if round(size)}
    return MemoryPlan(setup, _count_parameters(model), terms, phase)


def _build(config: FlorenceVLConfig, setup: TrainingSetup) -> nn.Module:
    """The model as it is trained, on the meta device."""
    config = copy.deepcopy(config)
    # Scaled rotary positions have no bearing on memory, but some read lengths out of tensors, which have no data here.
    rope = getattr(config.text_config, "rope_parameters", None)
    if rope:
        kept = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
        config.text_config.rope_parameters = {"rope_type": "default", **kept}
    # Fused attention may drop out scores on a GPU, but not on the CPU, which would hold them.
    for settings in (config.text_config, config.vision_config.text_config):
        settings.use_cache = False
        settings.attention_dropout = 0.0
    with torch.device("meta"):
        model = FlorenceVLForConditionalGeneration._from_config(
            config, dtype=setup.compute_dtype, attn_implementation=setup.attention
        )
    model.train()
    if setup.lora_rank is None:
        set_trainable(model, setup.stage)
    else:
        for module in _quantized_layers(model, setup):
            module.to(torch.bfloat16)  # what a layer is turned into when it computes
        train_projector = "projector" in STAGES[setup.stage]
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of Transformers, which peft asks by an older name
            adapted = get_peft_model(model, lora_config(model, rank=setup.lora_rank, train_projector=train_projector))
        model = adapted.get_base_model()
        model.train()
    if setup.gradient_checkpointing:
        enable_checkpointing(model)
    model.model.vision_tower.encoder.layerdrop = _NoLayerDrop()
    if setup.uses_autocast:
        for module in model.modules():
            if type(module) is nn.LayerNorm:
                module.__class__ = _LayerNormInFloat32
    return model


def _quantized_layers(model: nn.Module, setup: TrainingSetup) -> Iterator[nn.Linear]:
    """The linear layers that bitsandbytes takes: all of the language model, but those of LoRA."""
    if setup.bits is not None:
        for name, module in model.model.language_model.named_modules():
            if isinstance(module, nn.Linear) and "lora_" not in name:
                yield module


def _materialize(model: nn.Module) -> None:
    """Give all parameters and buffers storages without data, on what passes for the CPU: autocast knows no meta."""
    made: dict[int, torch.Tensor] = {}

    def make(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, nn.Parameter):
                made[id(tensor)] = nn.Parameter(made[id(tensor)], requires_grad=tensor.requires_grad)
        return made[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: make(tensor) for name, tensor in tensors.items() if tensor is not None})


class _NoLayerDrop:
    """A chance that BART's encoder compares random numbers with: tensors without data cannot be compared."""

    def __gt__(self, other: Any) -> bool:
        return False


class _LayerNormInFloat32(nn.LayerNorm):
    """As CUDA's autocast runs it; the CPU's leaves it in bfloat16."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight, bias = (None if tensor is None else tensor.float() for tensor in (self.weight, self.bias))
        return nn.functional.layer_norm(hidden_states.float(), self.normalized_shape, weight, bias, self.eps)


def _num_trained(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _bytes_of_trained(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)


def _share(amount: float, setup: TrainingSetup) -> int:
    return math.ceil(amount / setup.num_gpus)


def _count_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    counts = dict.fromkeys(PARTS, (0, 0))
    for name, parameter in model.named_parameters():
        total, trained = counts[part_of(name)]
        size = parameter.numel()
        counts[part_of(name)] = (total + size, trained + size * parameter.requires_grad)
    return counts


def _gradient_bytes(model: nn.Module, setup: TrainingSetup) -> int:
    """Of all gradients, after the backward pass."""
    if setup.is_deepspeed:
        return _share(_num_trained(model) * setup.compute_dtype.itemsize, setup)  # in the model's own type
    if setup.sharding == "fsdp2":
        return _share(4 * _num_trained(model) if setup.mixed_precision else _bytes_of_trained(model), setup)
    return _bytes_of_trained(model)


def _lasting_terms(model: nn.Module, setup: TrainingSetup) -> dict[str, float]:
    """Bytes that are held through the whole step, but for gradients."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    num_trained, trained_bytes = _num_trained(model), _bytes_of_trained(model)
    frozen_bytes = sum(parameter.nbytes for parameter in model.parameters() if not parameter.requires_grad)
    quantized = {id(module.weight): module.weight for module in _quantized_layers(model, setup)}.values()
    frozen_bytes += sum(weight.numel() * QUANTIZED_BYTES[setup.bits] - weight.nbytes for weight in quantized)
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    units = _fsdp_units(model)
    compute_size = setup.compute_dtype.itemsize

    terms: dict[str, float] = {}
    if setup.is_deepspeed:
        weights = frozen_bytes + compute_size * num_trained
        terms[WEIGHTS] = buffers + (_share(weights, setup) if setup.sharding == "zero3" else weights)
        terms["master weights"] = _share(4 * num_trained, setup)
        terms[OPTIMIZER] = _share(8 * num_trained, setup)
        if setup.sharding == "zero3":
            live = min(sum(parameter.numel() for parameter in model.parameters()), ZERO3_LIVE_PARAMETERS)
            terms["gathered weights"] = compute_size * live
        terms["communication"] = compute_size * min(num_trained, ZERO_BUCKET)
    elif setup.sharding == "fsdp2":
        # accelerate turns what is trained into float32, and gathers it in bfloat16.
        held = 4 * num_trained if setup.mixed_precision else trained_bytes
        terms[WEIGHTS] = buffers + _share(held + frozen_bytes * DTYPES[setup.dtype].itemsize / compute_size, setup)
        terms[OPTIMIZER] = _share(2 * held, setup)
        # The unit at work and the next one; the root and the head stay once they are gathered.
        sizes = [sum(parameter.numel() for parameter in unit) for unit in units.layers]
        kept = sum(parameter.numel() for parameter in units.kept)
        terms["gathered weights"] = compute_size * (sum(sorted(sizes)[-2:]) + kept)
        # Gradients of a unit are whole until they are reduced, which takes a copy.
        sizes = [sum(p.numel() for p in unit if p.requires_grad) for unit in (*units.layers, units.kept)]
        terms["communication"] = compute_size * 2 * max(sizes)
    else:
        terms[WEIGHTS] = buffers + trained_bytes + frozen_bytes
        terms[OPTIMIZER] = 2 * trained_bytes  # AdamW keeps its moments in the weights' type
        if setup.sharding == "ddp":
            terms["communication"] = sum(parameter.nbytes for parameter in trained)  # buckets beside the gradients
    if quantized:
        terms["dequantized layer"] = max(weight.numel() for weight in quantized) * 2
    return terms


@dataclass(frozen=True)
class _FSDPUnits:
    """What accelerate's FSDP2 gathers together. `kept` are the head and all that is in no layer."""

    layers: list[list[nn.Parameter]]
    kept: list[nn.Parameter]


def _fsdp_units(model: nn.Module) -> _FSDPUnits:
    """By transformer blocks, as `_no_split_modules` names them; the token embeddings are a unit of their own."""
    names = model._no_split_modules or ()
    layers = [list(m.parameters()) for m in model.modules() if type(m).__name__ in names]
    layers.append(list(model.get_input_embeddings().parameters()))
    known = {id(parameter) for unit in layers for parameter in unit}
    return _FSDPUnits(layers, [parameter for parameter in model.parameters() if id(parameter) not in known])


__all__ = ["GIB", "OPTIMIZER", "WEIGHTS", "MemoryPlan", "Sharding", "TrainingSetup", "plan_memory"]
