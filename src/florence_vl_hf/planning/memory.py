# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Memory per GPU of a training run: weights, gradients and optimizer states are counted, activations are measured."""

import copy
import math
import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import yaml
from peft import get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from ..modeling import FlorenceVLConfig, FlorenceVLForConditionalGeneration
from ..modeling.transformers_compat import enable_checkpointing
from ..training.adapters import lora_config
from ..training.arguments import parse_recipe
from ..training.stages import PARTS, STAGES, part_of, set_trainable


GIB = 2**30
GPU_SIZES = (24, 40, 48, 80)  # GiB of common GPUs
Sharding = Literal["none", "ddp", "zero2", "zero3", "fsdp2"]
DTYPES = ("bfloat16", "float16", "float32")
WEIGHTS, OPTIMIZER, GRADIENTS, LOGITS = "weights", "optimizer", "gradients", "logits and loss"
# DeepSpeed's `reduce_bucket_size`, `stage3_max_live_parameters` and `sub_group_size` (updated at once), in elements.
ZERO_BUCKET, ZERO3_LIVE_PARAMETERS, ZERO3_SUB_GROUP = 500_000_000, 1_000_000_000, 1_000_000_000
# Bytes per weight. NF4: half a byte, one 8-bit constant per 64 weights, a float32 per 256 constants. LLM.int8: a byte.
QUANTIZED_BYTES = {4: 0.5 + 1 / 64 + 4 / (64 * 256), 8: 1.0}


@dataclass(frozen=True)
class TrainingSetup:
    """The settings of a training run that its memory depends on, besides the model."""

    stage: str = "finetune"  # as in `set_trainable`
    batch_size: int = 1  # samples per GPU
    max_length: int = 2048  # tokens per sample, including image tokens
    images_per_sample: int = 1
    num_gpus: int = 1
    sharding: Sharding = "none"
    dtype: str = "bfloat16"  # of the weights as they are loaded
    mixed_precision: bool = True  # `bf16` or `fp16` of the Trainer
    gradient_checkpointing: bool = True
    gradient_accumulation_steps: int = 1
    lora_rank: int | None = None  # of LoRA on the language model
    bits: int | None = None  # 4 or 8 if the language model is quantized
    attention: str = "sdpa"  # "eager" stores the attention scores

    def __post_init__(self) -> None:
        choices = {"sharding": get_args(Sharding), "dtype": DTYPES, "bits": (None, 4, 8)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; it must be one of {allowed}.")
        for name in ("batch_size", "max_length", "num_gpus", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be at least 1.")
        if self.bits is not None and self.lora_rank is None:
            raise ValueError("`bits` is set but `lora_rank` is not; a quantized model is trained through LoRA.")

    @property
    def uses_autocast(self) -> bool:
        """Whether the forward pass runs under autocast. DeepSpeed casts the model instead."""
        return self.mixed_precision and self.sharding not in ("zero2", "zero3")

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the weights in the forward pass."""
        is_cast = self.mixed_precision and self.sharding not in ("none", "ddp")
        return torch.bfloat16 if is_cast else getattr(torch, self.dtype)


@dataclass(frozen=True)
class MemoryPlan:
    """Memory per GPU at the peak."""

    setup: TrainingSetup
    num_parameters: dict[str, tuple[int, int]]  # all and trained ones, by part of the model
    terms: dict[str, int]  # bytes, by what they hold
    peak: str  # "forward or backward pass" or "optimizer step"

    @property
    def total(self) -> int:
        return sum(self.terms.values())

    def fits(self, gib: float, margin: float = 0.1) -> bool:
        """Whether a GPU of `gib` GiB is large enough, with a fraction of `margin` left free."""
        return self.total <= gib * GIB * (1 - margin)

    @property
    def smallest_gpu(self) -> str:
        return next((f"{size} GB" for size in GPU_SIZES if self.fits(size)), f"more than {GPU_SIZES[-1]} GB")


def plan_memory(config: FlorenceVLConfig, setup: TrainingSetup | None = None, **settings: Any) -> MemoryPlan:
    """Plan the memory of a training run: of `setup`, or of `TrainingSetup(**settings)`."""
    setup = setup or TrainingSetup(**settings)
    num_image_tokens = setup.images_per_sample * config.num_image_tokens
    if num_image_tokens > setup.max_length:
        raise ValueError(
            f"`max_length` is {setup.max_length}, but the {setup.images_per_sample} images of a sample take "
            f"{num_image_tokens} tokens; increase `max_length`."
        )
    model = _build_model(config, setup)
    held, gradients, float32_gradients = _count_held(model, setup)
    # Gradients grow while activations are freed. Accumulated gradients, and ZeRO-3's buffer, are held all the time.
    holds_gradients = setup.gradient_accumulation_steps > 1 or setup.sharding == "zero3"
    trained_bytes = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    measured = _measure_step(model, setup, gradient_share=0 if holds_gradients else gradients / trained_bytes)
    in_passes = held | measured | ({GRADIENTS: gradients} if holds_gradients else {})
    in_update = held | {GRADIENTS: gradients, "gradients in float32": float32_gradients}
    peak = max(in_passes, in_update, key=lambda terms: sum(terms.values()))

    counts = dict.fromkeys(PARTS, (0, 0))
    for name, parameter in model.named_parameters():
        total, trained = counts[part_of(name)]
        counts[part_of(name)] = (total + parameter.numel(), trained + parameter.numel() * parameter.requires_grad)
    terms = {name: round(size) for name, size in peak.items() if round(size)}
    return MemoryPlan(setup, counts, terms, "optimizer step" if peak is in_update else "forward or backward pass")


def _build_model(config: FlorenceVLConfig, setup: TrainingSetup) -> Any:
    """Build the model as it is trained, of fake tensors on the CPU: autocast does not support the meta device."""
    config = copy.deepcopy(config)
    # Scaled rotary embeddings take no more memory, but some of them read the data of tensors.
    rope = getattr(config.text_config, "rope_parameters", None) or {}
    if "rope_type" in rope:
        config.text_config.rope_parameters = {**rope, "rope_type": "default"}
    for text_config in (config.text_config, config.vision_config.text_config):
        text_config.use_cache = False
        text_config.attention_dropout = 0.0  # fused on a GPU, but stores the scores on the CPU
    with torch.device("meta"):
        model = FlorenceVLForConditionalGeneration._from_config(
            config, dtype=setup.compute_dtype, attn_implementation=setup.attention
        )
        set_trainable(model, setup.stage)
        if setup.lora_rank is not None:
            lora = lora_config(model, rank=setup.lora_rank, train_projector="projector" in STAGES[setup.stage])
            model = get_peft_model(model, lora).get_base_model()
    for weight in _quantized_weights(model) if setup.bits is not None else []:
        weight.data = weight.data.to(torch.bfloat16)  # the dtype it is dequantized to
    model.train()
    # Layerdrop compares random numbers, which fake tensors do not have. The layers themselves stay in training mode.
    model.model.vision_tower.encoder.training = False
    if setup.gradient_checkpointing:
        enable_checkpointing(model)
    for module in model.modules():
        if setup.uses_autocast and isinstance(module, nn.LayerNorm):  # float32 under autocast, but only on CUDA
            module.register_forward_pre_hook(lambda module, args: args[0].float())
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        model.tie_weights()
    return model


def _quantized_weights(model: Any) -> list[nn.Parameter]:
    # bitsandbytes quantizes the layers that LoRA adapts: all linear layers of the language model.
    return [parameter for name, parameter in model.named_parameters() if name.endswith("base_layer.weight")]


def _count_held(model: Any, setup: TrainingSetup) -> tuple[dict[str, float], float, float]:
    """Count the bytes held during the whole step, by term, of all gradients, and of their copies in float32."""

    def size(parameters: Iterable[nn.Parameter]) -> int:
        return sum(parameter.numel() for parameter in parameters)

    def share(num_bytes: float) -> int:
        return math.ceil(num_bytes / setup.num_gpus)

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    num_trained, trained_bytes = size(trained), sum(parameter.nbytes for parameter in trained)
    frozen_bytes = sum(parameter.nbytes for parameter in model.parameters()) - trained_bytes
    buffer_bytes = sum(buffer.nbytes for buffer in model.buffers())
    itemsize = setup.compute_dtype.itemsize
    terms: dict[str, float] = {}
    if setup.bits is not None:
        quantized = _quantized_weights(model)
        frozen_bytes += size(quantized) * QUANTIZED_BYTES[setup.bits] - sum(weight.nbytes for weight in quantized)
        terms["dequantized layer"] = max(weight.nbytes for weight in quantized)

    if setup.sharding in ("zero2", "zero3"):
        # The update copies gradients to float32; with ZeRO-3, those of a sub-group at a time.
        weights, updated = frozen_bytes + itemsize * num_trained, share(num_trained)
        if setup.sharding == "zero3":
            weights, updated = share(weights), min(updated, ZERO3_SUB_GROUP)
            terms["gathered weights"] = itemsize * min(size(model.parameters()), ZERO3_LIVE_PARAMETERS)
        terms |= {WEIGHTS: buffer_bytes + weights, "master weights": share(4 * num_trained)}
        terms |= {OPTIMIZER: share(8 * num_trained), "communication": itemsize * min(num_trained, ZERO_BUCKET)}
        return terms, share(itemsize * num_trained), 4 * updated
    if setup.sharding == "fsdp2":
        # accelerate holds trained weights in float32, and frozen ones as they are loaded.
        held_bytes = 4 * num_trained if setup.mixed_precision else trained_bytes
        frozen_bytes *= getattr(torch, setup.dtype).itemsize / itemsize
        terms |= {WEIGHTS: buffer_bytes + share(held_bytes + frozen_bytes), OPTIMIZER: share(2 * held_bytes)}
        # Units are gathered, two at a time: the layers and the embedding table. The root, all other parameters, stays.
        layers = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
        units = [list(module.parameters()) for module in (*layers, model.get_input_embeddings())]
        in_units = {id(parameter) for unit in units for parameter in unit}
        root = [parameter for parameter in model.parameters() if id(parameter) not in in_units]
        terms["gathered weights"] = itemsize * (sum(sorted(map(size, units))[-2:]) + size(root))
        trained_sizes = [size(parameter for parameter in unit if parameter.requires_grad) for unit in (*units, root)]
        terms["communication"] = 2 * itemsize * max(trained_sizes)  # the gradients of a unit, and the reduced copy
        return terms, share(held_bytes), 0
    terms |= {WEIGHTS: buffer_bytes + trained_bytes + frozen_bytes, OPTIMIZER: 2 * trained_bytes}
    if setup.sharding == "ddp":
        terms["communication"] = trained_bytes  # buckets as large as the gradients
    return terms, trained_bytes, 0


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of live tensors by label, and keeps the counts at the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.label = "batch"
        self.live, self.peak = Counter[str](), Counter[str]()
        self.known = WeakIdKeyDictionary()  # storages that are counted, or ignored

    def set_label(self, label: str, *hook_args: Any) -> None:
        self.label = label

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for storage in [leaf.untyped_storage() for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]:
            if storage not in self.known:
                self.known[storage] = True
                self.live[self.label] += storage.nbytes()
                weakref.finalize(storage, self.live.subtract, {self.label: storage.nbytes()})
        if self.live.total() > self.peak.total():
            self.peak = self.live.copy()
        return outputs


def _measure_step(model: Any, setup: TrainingSetup, gradient_share: float) -> dict[str, float]:
    """Measure the peak of a forward and a backward pass, in bytes by label, without the model's own tensors."""
    florence, watch, shards = model.model, _LiveBytes(), []
    for tensor in (*model.parameters(), *model.buffers()):
        watch.known[tensor.untyped_storage()] = True
    for part in ("vision_tower", "multi_modal_projector", "language_model"):
        label = partial(watch.set_label, f"activations of the {part.removeprefix('multi_modal_').replace('_', ' ')}")
        getattr(florence, part).register_forward_pre_hook(label)
    model.lm_head.register_forward_pre_hook(partial(watch.set_label, LOGITS))
    model.lm_head.register_full_backward_pre_hook(partial(watch.set_label, "backward pass of a layer"))

    def shard_gradient(parameter: nn.Parameter) -> None:
        parameter.grad = None
        label, watch.label = watch.label, GRADIENTS
        shards.append(torch.empty(round(gradient_share * parameter.nbytes), dtype=torch.uint8))
        watch.label = label

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(shard_gradient)
    # The check of the number of image tokens reads the data of tensors.
    florence.get_placeholder_mask = lambda input_ids, inputs_embeds, features: (input_ids == 0).unsqueeze(-1)

    # All text is learned. With a mask, as for a padded batch, attention stores a number per pair of positions.
    num_logits = max(setup.max_length - setup.images_per_sample * model.config.num_image_tokens, 1)
    lengths = dict.fromkeys(("input_ids", "attention_mask", "labels"), setup.max_length) | {"shift_labels": num_logits}
    # Batches of text have one black image, unless only the language model is trained.
    num_images = setup.batch_size * setup.images_per_sample or int(STAGES[setup.stage] != ("language_model",))
    with next(model.parameters()).fake_mode, watch:
        batch = {name: torch.zeros(setup.batch_size, length, dtype=torch.long) for name, length in lengths.items()}
        if num_images:
            batch["pixel_values"] = torch.zeros(num_images, *florence.vision_tower.image_shape)
        with torch.autocast("cpu", torch.bfloat16, enabled=setup.uses_autocast):
            loss = model(**batch, logits_to_keep=torch.zeros(num_logits, dtype=torch.long)).loss
        loss.backward()
    return dict(watch.peak)


def read_setup(
    recipe: dict[str, Any],
    num_gpus: int | None = None,
    sharding: Sharding | None = None,
    accelerate_config: str | Path | None = None,
    images_per_sample: int = 1,
) -> tuple[str, dict[str, Any], TrainingSetup]:
    """
    Read the model (path or Hub id), the changes to its configuration and the run of a recipe of `read_recipe`.

    `num_gpus` and `sharding` override those of `accelerate_config`, the configuration file of `accelerate launch`.
    """
    # `TrainingArguments` checks these against this machine, which need not be the one that trains.
    ignored = ("bf16", "fp16", "tf32", "use_cpu", "deepspeed", "fsdp", "fsdp_config", "accelerator_config")
    settings = {name: value for name, value in recipe.items() if name not in ignored}
    model, data, training = parse_recipe(settings | {"use_cpu": True})
    if training.optim != "adamw_torch_fused":
        raise ValueError(f"`optim` is {recipe.get('optim')!r}; planning supports adamw_torch_fused only.")
    file_gpus, file_sharding = _read_accelerate_config(accelerate_config) if accelerate_config else (1, None)
    num_gpus = num_gpus or file_gpus
    setup = TrainingSetup(
        stage=model.stage,
        batch_size=training.per_device_train_batch_size,
        max_length=data.max_length,
        images_per_sample=images_per_sample,
        num_gpus=num_gpus,
        sharding=sharding or file_sharding or ("none" if num_gpus == 1 else "ddp"),
        dtype=model.dtype,
        mixed_precision=bool(recipe.get("bf16") or recipe.get("fp16")),
        gradient_checkpointing=bool(training.gradient_checkpointing),
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        lora_rank=model.lora_r if model.use_peft else None,
        bits=model.num_bits,
        attention="eager" if model.attn_implementation == "eager" else "sdpa",
    )
    return model.model_name_or_path, model.fusion_changes, setup


def _read_accelerate_config(path: str | Path) -> tuple[int, Sharding]:
    """Read the number of processes and the sharding."""
    launch = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    deepspeed, fsdp = launch.get("deepspeed_config") or {}, launch.get("fsdp_config") or {}
    shardings: dict[str, Sharding] = {"NO": "none", "MULTI_GPU": "ddp"}
    if fsdp.get("fsdp_version") == 2 and fsdp.get("fsdp_reshard_after_forward", True) is True:
        shardings["FSDP"] = "fsdp2"
    if deepspeed.get("zero_stage") in (2, 3):
        shardings["DEEPSPEED"] = "zero2" if deepspeed["zero_stage"] == 2 else "zero3"
    sharding = shardings.get(launch.get("distributed_type", "NO"))
    offloads = {deepspeed.get(f"offload_{kind}_device", "none") for kind in ("optimizer", "param")} != {"none"}
    if sharding is None or offloads or fsdp.get("fsdp_offload_params"):
        raise ValueError(
            f"{path} is not supported by planning; `distributed_type` must be NO, MULTI_GPU, FSDP (version 2, with "
            f"fsdp_reshard_after_forward) or DEEPSPEED (zero_stage 2 or 3, set in the file), without offloading."
        )
    return launch.get("num_processes", 1), sharding


# The paper's four runs, and runs on fewer GPUs.
KNOWN_RUNS = {
    "pretrain 8B": ("8b", TrainingSetup("pretrain", 16, num_gpus=128, sharding="zero3")),
    "pretrain 3B": ("3b", TrainingSetup("pretrain", 32, num_gpus=128, sharding="zero2")),
    "finetune 8B": ("8b", TrainingSetup("finetune", 8, num_gpus=32, sharding="zero2", gradient_accumulation_steps=2)),
    "finetune 3B": ("3b", TrainingSetup("finetune", 32, num_gpus=32, sharding="zero2", gradient_accumulation_steps=4)),
    "finetune 8B, one machine": ("8b", TrainingSetup("finetune", 4, num_gpus=8, sharding="fsdp2")),
    "finetune 3B, one machine": ("3b", TrainingSetup("finetune", 8, num_gpus=8, sharding="fsdp2")),
    "projector alone, 8B": ("8b", TrainingSetup("projector", 4)),
    "projector alone, 3B": ("3b", TrainingSetup("projector", 4)),
    "LoRA 8B": ("8b", TrainingSetup("finetune", 4, lora_rank=64)),
    "LoRA 3B": ("3b", TrainingSetup("finetune", 4, lora_rank=64)),
    "QLoRA 8B": ("8b", TrainingSetup("finetune", 2, lora_rank=64, bits=4)),
    "QLoRA 3B": ("3b", TrainingSetup("finetune", 2, lora_rank=64, bits=4)),
}


def published_config(size: str) -> FlorenceVLConfig:
    """The configuration of the published `8b`, with Llama-3.1-8B, or `3b`, with Phi-3.5-mini."""
    if size == "8b":
        return FlorenceVLConfig()
    if size == "3b":  # Transformers' default of `phi3` is Phi-3-mini, with the shapes of Phi-3.5-mini
        return FlorenceVLConfig(text_config={"model_type": "phi3"}, image_token_id=32011)
    raise ValueError(f"Got size {size!r}; it must be 8b or 3b.")


def plan_known_runs() -> dict[str, MemoryPlan]:
    """Plan `KNOWN_RUNS`."""
    return {name: plan_memory(published_config(size), setup) for name, (size, setup) in KNOWN_RUNS.items()}


def format_plan(plan: MemoryPlan) -> str:
    """Format a plan as text: parameters by part, bytes by term, and the smallest GPU."""
    setup, gpus = plan.setup, "GPU" if plan.setup.num_gpus == 1 else "GPUs"
    lines = [
        f"{part.replace('_', ' '):<34} {total / 1e6:>10,.1f} million parameters, {trained / 1e6:,.1f} trained"
        for part, (total, trained) in plan.num_parameters.items()
    ]
    for name, num_bytes in (plan.terms | {"total per GPU": plan.total}).items():
        lines.append(f"{name:<34} {num_bytes / GIB:>10.2f} GiB")
    lines.append(
        f"{setup.num_gpus} {gpus}, {setup.sharding}, {setup.batch_size} samples of {setup.max_length} tokens."
    )
    lines.append(f"Peak: {plan.peak}. Smallest GPU with 10% left free: {plan.smallest_gpu}.")
    return "\n".join(lines)


def format_table(plans: dict[str, MemoryPlan]) -> str:
    """Format plans as a Markdown table, in GiB per GPU."""
    columns = {
        "weights": (WEIGHTS, "gathered weights", "dequantized layer"),
        "optimizer": (OPTIMIZER, "master weights", "gradients in float32"),
        "gradients": (GRADIENTS, "communication"),
        "logits": (LOGITS,),
    }
    lines = [f"|  | GPUs | batch | sharding | {' | '.join(columns)} | activations | **total** | GPU |"]
    lines.append(f"| --- | ---: | ---: | --- |{' ---: |' * (len(columns) + 2)} --- |")
    for name, plan in plans.items():
        sums = [sum(plan.terms.get(term, 0) for term in terms) for terms in columns.values()]
        sizes = " | ".join(f"{size / GIB:.1f}" for size in (*sums, plan.total - sum(sums)))
        setup = f"{plan.setup.num_gpus} | {plan.setup.batch_size} | {plan.setup.sharding}"
        lines.append(f"| {name} | {setup} | {sizes} | **{plan.total / GIB:.1f}** | {plan.smallest_gpu} |")
    return "\n".join(lines)
