# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Memory per GPU of a training run: weights, gradients and optimizer states are counted, activations are measured."""

import copy
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
from ..training import RECIPES, lora_config, read_recipe, set_trainable
from ..training.arguments import DataArguments, FlorenceVLTrainingArguments, ModelArguments, parse_recipe
from ..training.stages import PARTS, STAGES, count_trained, part_of


GIB = 2**30
GPU_SIZES = (24, 40, 48, 80)  # GiB of common GPUs
Sharding = Literal["none", "ddp", "zero2", "zero3", "fsdp2"]
Shape = Literal["8b", "3b"]
WEIGHTS, OPTIMIZER, GRADIENTS, LOGITS = "weights", "optimizer", "gradients", "logits and loss"
# DeepSpeed's `reduce_bucket_size`, `stage3_max_live_parameters` and `sub_group_size` (updated at once), in elements.
ZERO_BUCKET, ZERO3_LIVE_PARAMETERS, ZERO3_SUB_GROUP = 500_000_000, 1_000_000_000, 1_000_000_000
# Bytes per weight. NF4: half a byte, one 8-bit constant per 64 weights, a float32 per 256 constants. LLM.int8: a byte.
QUANTIZED_BYTES = {None: 0.0, 4: 0.5 + 1 / 64 + 4 / (64 * 256), 8: 1.0}


@dataclass(frozen=True)
class TrainingSetup:
    """The settings of a recipe, and the GPUs that it runs on. Built by `read_setup`."""

    model: ModelArguments
    data: DataArguments
    training: FlorenceVLTrainingArguments
    num_gpus: int
    sharding: Sharding
    images_per_sample: int

    @property
    def batch_size(self) -> int:
        """Samples per GPU."""
        return self.training.per_device_train_batch_size

    @property
    def uses_deepspeed(self) -> bool:
        return self.sharding in ("zero2", "zero3")

    @property
    def uses_mixed_precision(self) -> bool:
        return self.training.bf16 or self.training.fp16

    @property
    def uses_autocast(self) -> bool:
        """Whether the forward pass runs under autocast. DeepSpeed casts the model instead."""
        return self.uses_mixed_precision and not self.uses_deepspeed

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the weights in the forward pass."""
        is_cast = self.uses_mixed_precision and self.sharding not in ("none", "ddp")
        return torch.bfloat16 if is_cast else getattr(torch, self.model.dtype)


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

    @property
    def smallest_gpu(self) -> str:
        """The smallest common GPU with 10% left free."""
        fitting = (f"{size} GB" for size in GPU_SIZES if self.total <= 0.9 * size * GIB)
        return next(fitting, f"more than {GPU_SIZES[-1]} GB")


def plan_memory(config: FlorenceVLConfig, setup: TrainingSetup) -> MemoryPlan:
    """Plan the memory of a training run. Raises a `ValueError` if the images of a sample exceed `max_length`."""
    num_image_tokens, max_length = setup.images_per_sample * config.num_image_tokens, setup.data.max_length
    if num_image_tokens > max_length:
        raise ValueError(
            f"Got images of {num_image_tokens} tokens per sample, but `max_length: {max_length}`; increase it."
        )
    model = _build_model(config, setup)
    held, gradients, float32_gradients = _count_held(model, setup)
    # Gradients grow while activations are freed. Accumulated gradients, and ZeRO-3's buffer, are held all the time.
    holds_gradients = setup.training.gradient_accumulation_steps > 1 or setup.sharding == "zero3"
    in_passes = held | _measure_step(model, setup, growing_gradients=0 if holds_gradients else gradients)
    if holds_gradients:
        in_passes[GRADIENTS] = gradients
    in_update = held | {GRADIENTS: gradients, "gradients in float32": float32_gradients}
    peak = max(in_passes, in_update, key=lambda terms: sum(terms.values()))

    totals, trained = Counter[str](), count_trained(model)
    for name, parameter in model.named_parameters():
        totals[part_of(name)] += parameter.numel()
    return MemoryPlan(
        setup,
        num_parameters={part: (totals[part], trained.get(part, 0)) for part in PARTS},
        terms={name: round(size) for name, size in peak.items() if round(size)},
        peak="optimizer step" if peak is in_update else "forward or backward pass",
    )


def _build_model(config: FlorenceVLConfig, setup: TrainingSetup) -> Any:
    """Build the model as it is trained, of fake tensors on the CPU: autocast does not support the meta device."""
    config = copy.deepcopy(config)
    # Scaled rotary embeddings take no more memory, but some of them read the data of tensors.
    rope = getattr(config.text_config, "rope_parameters", None) or {}
    if "rope_type" in rope:
        rope["rope_type"] = "default"
    for text_config in (config.text_config, config.vision_config.text_config):
        text_config.use_cache = False
        text_config.attention_dropout = 0.0  # fused on a GPU, but stores the scores on the CPU
    # Flash attention needs a GPU, and the memory of sdpa.
    attention = "eager" if setup.model.attn_implementation == "eager" else "sdpa"
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = FlorenceVLForConditionalGeneration._from_config(
            config, dtype=setup.compute_dtype, attn_implementation=attention
        )
        set_trainable(model, setup.model.stage)
        if setup.model.use_peft:
            train_projector = "projector" in STAGES[setup.model.stage]
            lora = lora_config(model, rank=setup.model.lora_r, train_projector=train_projector)
            model = get_peft_model(model, lora).get_base_model()
        for weight in _quantized_weights(model, setup):
            weight.data = weight.data.to(torch.bfloat16)  # the dtype it is dequantized to
    model.train()
    # Layerdrop compares random numbers, which fake tensors do not have. The layers themselves stay in training mode.
    model.model.vision_tower.encoder.training = False
    if setup.training.gradient_checkpointing:
        enable_checkpointing(model)
    for module in model.modules():
        if setup.uses_autocast and isinstance(module, nn.LayerNorm):  # float32 under autocast, but only on CUDA
            module.register_forward_pre_hook(lambda module, args: args[0].float())
    return model


def _quantized_weights(model: Any, setup: TrainingSetup) -> list[nn.Parameter]:
    # bitsandbytes quantizes the layers that LoRA adapts: all linear layers of the language model.
    names = ("base_layer.weight",) if setup.model.num_bits else ()
    return [parameter for name, parameter in model.named_parameters() if name.endswith(names)]


def _count_held(model: Any, setup: TrainingSetup) -> tuple[dict[str, float], float, float]:
    """Count the bytes held during the whole step, by term, of all gradients, and of their copies in float32."""

    def size(parameters: Iterable[nn.Parameter]) -> int:
        return sum(parameter.numel() for parameter in parameters)

    parameters, quantized = list(model.parameters()), _quantized_weights(model, setup)
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    num_trained, itemsize = size(trained), setup.compute_dtype.itemsize
    is_sharded = setup.sharding in ("zero2", "zero3", "fsdp2")
    num_shards = setup.num_gpus if is_sharded else 1

    # accelerate holds the trained weights of FSDP in float32, and frozen ones as they are loaded.
    updated_bytes = sum(parameter.nbytes for parameter in trained)
    if is_sharded and (setup.uses_deepspeed or setup.uses_mixed_precision):
        updated_bytes = 4 * num_trained
    trained_bytes = itemsize * num_trained if setup.uses_deepspeed else updated_bytes
    frozen_itemsize = itemsize if setup.uses_deepspeed else getattr(torch, setup.model.dtype).itemsize
    frozen_bytes = frozen_itemsize * (size(parameters) - num_trained - size(quantized))
    frozen_bytes += QUANTIZED_BYTES[setup.model.num_bits] * size(quantized)
    buffer_bytes = sum(buffer.nbytes for buffer in model.buffers())
    terms: dict[str, float] = {
        WEIGHTS: buffer_bytes + (trained_bytes + frozen_bytes) / (1 if setup.sharding == "zero2" else num_shards),
        OPTIMIZER: 2 * updated_bytes / num_shards,
        "dequantized layer": max((weight.nbytes for weight in quantized), default=0),
    }
    float32_gradients = 0.0
    if setup.uses_deepspeed:
        terms["master weights"] = updated_bytes / num_shards
        terms["communication"] = itemsize * min(num_trained, ZERO_BUCKET)
        float32_gradients = 4 * num_trained / num_shards
    if setup.sharding == "zero3":
        terms["gathered weights"] = itemsize * min(size(parameters), ZERO3_LIVE_PARAMETERS)
        float32_gradients = min(float32_gradients, 4 * ZERO3_SUB_GROUP)
    elif setup.sharding == "fsdp2":
        # Units are gathered, two at a time: the layers and the embedding table. The root, all other parameters, stays.
        layers = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
        units = [set(module.parameters()) for module in (*layers, model.get_input_embeddings())]
        root = set(parameters).difference(*units)
        terms["gathered weights"] = itemsize * (sum(sorted(map(size, units))[-2:]) + size(root))
        # The gradients of a unit, and the reduced copy.
        terms["communication"] = 2 * itemsize * max(size(unit.intersection(trained)) for unit in (*units, root))
    elif setup.sharding == "ddp":
        terms["communication"] = trained_bytes  # buckets as large as the gradients
    return terms, trained_bytes / num_shards, float32_gradients


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


def _measure_step(model: Any, setup: TrainingSetup, growing_gradients: float) -> dict[str, float]:
    """Measure the peak of both passes, in bytes by label, with gradients that grow to `growing_gradients` bytes."""
    florence, watch = model.model, _LiveBytes()
    for tensor in (*model.parameters(), *model.buffers()):
        watch.known[tensor.untyped_storage()] = True
    for part, (module, *_) in PARTS.items():
        label = f"activations of the {part.replace('_', ' ')}"
        getattr(florence, module).register_forward_pre_hook(partial(watch.set_label, label))
    model.lm_head.register_forward_pre_hook(partial(watch.set_label, LOGITS))
    model.lm_head.register_full_backward_pre_hook(partial(watch.set_label, "backward pass of a layer"))

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    share = growing_gradients / sum(parameter.nbytes for parameter in trained)

    def keep_share(parameter: nn.Parameter) -> None:
        parameter.grad = None
        watch.live[GRADIENTS] += round(share * parameter.nbytes)

    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(keep_share)
    # The check of the number of image tokens reads the data of tensors.
    florence.get_placeholder_mask = lambda input_ids, inputs_embeds, features: (input_ids == 0).unsqueeze(-1)

    # All text is learned. With a mask, as for a padded batch, attention stores a number per pair of positions.
    num_logits = max(setup.data.max_length - setup.images_per_sample * model.config.num_image_tokens, 1)
    lengths = dict.fromkeys(("input_ids", "attention_mask", "labels"), setup.data.max_length)
    lengths["shift_labels"] = num_logits
    # Batches of text have one black image, unless only the language model is trained.
    num_images = setup.batch_size * setup.images_per_sample or int(setup.model.stage != "language_model")
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

    `num_gpus` and `sharding` override those of `accelerate_config`: the configuration file of `accelerate launch`, or
    the name of a file of the package, such as `fsdp2`.
    """
    # `TrainingArguments` checks these against this machine, which need not be the one that trains.
    ignored = ("tf32", "deepspeed", "fsdp", "fsdp_config")
    settings = {name: value for name, value in recipe.items() if name not in ignored}
    model, data, training = parse_recipe(settings | {"use_cpu": True})
    if training.optim != "adamw_torch_fused":
        raise ValueError(f"Got `optim: {recipe.get('optim')}`; planning supports adamw_torch_fused only.")
    file_gpus, file_sharding = _read_accelerate_config(accelerate_config) if accelerate_config else (1, None)
    num_gpus = num_gpus or file_gpus
    sharding = sharding or file_sharding or ("none" if num_gpus == 1 else "ddp")
    if sharding not in get_args(Sharding):
        raise ValueError(f"Got sharding {sharding!r}, expected one of {', '.join(get_args(Sharding))}.")
    if min(num_gpus, training.per_device_train_batch_size, training.gradient_accumulation_steps) < 1:
        raise ValueError("The number of GPUs, batch size and gradient accumulation steps must be at least 1.")
    setup = TrainingSetup(model, data, training, num_gpus, sharding, images_per_sample)
    return model.model_name_or_path, model.fusion_changes, setup


def _read_accelerate_config(name: str | Path) -> tuple[int, Sharding]:
    """Read the number of processes and the sharding of a file, by its path or its name in the package."""
    shipped = {path.stem: path for path in sorted(RECIPES.glob("accelerate/*.yaml"))}
    path = Path(name) if Path(name).is_file() else shipped.get(str(name))
    if path is None:
        raise ValueError(f"There is no file {name}; give the path of a YAML file, or one of {', '.join(shipped)}.")
    launch = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
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
            f"Planning does not support {path}; `distributed_type` must be NO, MULTI_GPU, FSDP (version 2, with "
            f"fsdp_reshard_after_forward) or DEEPSPEED (zero_stage 2 or 3, set in the file), without offloading."
        )
    return launch.get("num_processes", 1), sharding


# Recipe, shape of the model, GPUs, sharding, and batch size if it is not the recipe's. The paper's runs come first.
KNOWN_RUNS: dict[str, tuple[str, Shape, int, Sharding, int | None]] = {
    "pretrain 8B": ("pretrain_8b", "8b", 128, "zero3", None),
    "pretrain 3B": ("pretrain_3b", "3b", 128, "zero2", None),
    "finetune 8B": ("finetune_8b", "8b", 32, "zero2", None),
    "finetune 3B": ("finetune_3b", "3b", 32, "zero2", None),
    "finetune 8B, one machine": ("finetune_8b", "8b", 8, "fsdp2", 4),
    "finetune 3B, one machine": ("finetune_3b", "3b", 8, "fsdp2", 8),
    "projector alone, 8B": ("projector_8b", "8b", 1, "none", 4),
    "projector alone, 3B": ("projector_8b", "3b", 1, "none", 4),
    "LoRA 8B": ("lora_8b", "8b", 1, "none", 4),
    "LoRA 3B": ("lora_8b", "3b", 1, "none", 4),
    "QLoRA 8B": ("qlora_8b", "8b", 1, "none", 2),
    "QLoRA 3B": ("qlora_8b", "3b", 1, "none", 2),
}


def plan_known_runs(*names: str) -> dict[str, MemoryPlan]:
    """Plan runs of `KNOWN_RUNS`, by default all."""
    plans = {}
    for name in names or KNOWN_RUNS:
        recipe, shape, num_gpus, sharding, batch_size = KNOWN_RUNS[name]
        changes = {"dtype": "bfloat16", "per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 1}
        _, _, setup = read_setup(read_recipe(recipe) | (changes if batch_size else {}), num_gpus, sharding)
        plans[name] = plan_memory(published_config(shape), setup)
    return plans


def published_config(shape: Shape) -> FlorenceVLConfig:
    """The configuration of the published `8b`, with Llama-3.1-8B, or `3b`, with Phi-3.5-mini."""
    if shape == "8b":
        return FlorenceVLConfig()
    # Transformers' default of `phi3` is Phi-3-mini, with the shapes of Phi-3.5-mini.
    return FlorenceVLConfig(text_config={"model_type": "phi3"}, image_token_id=32011)


def format_plan(plan: MemoryPlan) -> str:
    """Format a plan as text: parameters by part, bytes by term, and the smallest GPU."""
    setup = plan.setup
    lines = [
        f"{part.replace('_', ' '):<34} {total / 1e6:>10,.1f} million parameters, {trained / 1e6:,.1f} trained"
        for part, (total, trained) in plan.num_parameters.items()
    ]
    for term, num_bytes in (plan.terms | {"total per GPU": plan.total}).items():
        lines.append(f"{term:<34} {num_bytes / GIB:>10.2f} GiB")
    gpus = f"{setup.num_gpus} {'GPU' if setup.num_gpus == 1 else 'GPUs'}, {setup.sharding}"
    lines.append(f"{gpus}, {setup.batch_size} samples of {setup.data.max_length} tokens.")
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
        setup = plan.setup
        sums = [sum(plan.terms.get(term, 0) for term in terms) for terms in columns.values()]
        sizes = " | ".join(f"{size / GIB:.1f}" for size in (*sums, plan.total - sum(sums)))
        run = f"{setup.num_gpus} | {setup.batch_size} | {setup.sharding}"
        lines.append(f"| {name} | {run} | {sizes} | **{plan.total / GIB:.1f}** | {plan.smallest_gpu} |")
    return "\n".join(lines)
