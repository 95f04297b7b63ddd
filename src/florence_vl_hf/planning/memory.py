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
from ..training import RECIPES, lora_config, set_trainable
from ..training.arguments import parse_recipe
from ..training.stages import PARTS, STAGES, count_trained, part_of


GIB = 2**30
GPU_SIZES = (24, 40, 48, 80)  # GiB of common GPUs
Sharding = Literal["none", "ddp", "zero2", "zero3", "fsdp2"]
WEIGHTS, OPTIMIZER, GRADIENTS, LOGITS = "weights", "optimizer", "gradients", "logits and loss"
# DeepSpeed's `reduce_bucket_size`, `stage3_max_live_parameters` and `sub_group_size` (updated at once), in elements.
ZERO_BUCKET, ZERO3_LIVE_PARAMETERS, ZERO3_SUB_GROUP = 500_000_000, 1_000_000_000, 1_000_000_000
# Bytes per weight. NF4: half a byte, one 8-bit constant per 64 weights, a float32 per 256 constants. LLM.int8: a byte.
QUANTIZED_BYTES = {None: 0.0, 4: 0.5 + 1 / 64 + 4 / (64 * 256), 8: 1.0}


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
        dtypes = ("bfloat16", "float16", "float32")
        for name, allowed in {"sharding": get_args(Sharding), "dtype": dtypes, "bits": (None, 4, 8)}.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"Got {name} {getattr(self, name)!r}, expected one of {allowed}.")
        for name in ("batch_size", "max_length", "num_gpus", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"Got {name} {getattr(self, name)}, expected at least 1.")
        if self.bits is not None and self.lora_rank is None:
            raise ValueError("Got `bits` without `lora_rank`; a quantized model is trained through LoRA.")

    @property
    def uses_deepspeed(self) -> bool:
        return self.sharding in ("zero2", "zero3")

    @property
    def uses_autocast(self) -> bool:
        """Whether the forward pass runs under autocast. DeepSpeed casts the model instead."""
        return self.mixed_precision and not self.uses_deepspeed

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

    @property
    def smallest_gpu(self) -> str:
        """The smallest common GPU with 10% left free."""
        fitting = (f"{size} GB" for size in GPU_SIZES if self.total <= 0.9 * size * GIB)
        return next(fitting, f"more than {GPU_SIZES[-1]} GB")


def plan_memory(config: FlorenceVLConfig, setup: TrainingSetup | None = None, **settings: Any) -> MemoryPlan:
    """Plan the memory of a training run: of `setup`, or of `TrainingSetup(**settings)`."""
    setup = setup or TrainingSetup(**settings)
    num_tokens = setup.images_per_sample * config.num_image_tokens
    if num_tokens > setup.max_length:
        raise ValueError(f"Got `max_length` {setup.max_length}, but the images of a sample take {num_tokens} tokens.")
    model = _build_model(config, setup)
    held, gradients, float32_gradients = _count_held(model, setup)
    # Gradients grow while activations are freed. Accumulated gradients, and ZeRO-3's buffer, are held all the time.
    holds_gradients = setup.gradient_accumulation_steps > 1 or setup.sharding == "zero3"
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
    with torch.device("meta"):
        model = FlorenceVLForConditionalGeneration._from_config(
            config, dtype=setup.compute_dtype, attn_implementation=setup.attention
        )
        set_trainable(model, setup.stage)
        if setup.lora_rank is not None:
            lora = lora_config(model, rank=setup.lora_rank, train_projector="projector" in STAGES[setup.stage])
            model = get_peft_model(model, lora).get_base_model()
    for weight in _quantized_weights(model, setup):
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


def _quantized_weights(model: Any, setup: TrainingSetup) -> list[nn.Parameter]:
    # bitsandbytes quantizes the layers that LoRA adapts: all linear layers of the language model.
    names = ("base_layer.weight",) if setup.bits else ()
    return [parameter for name, parameter in model.named_parameters() if name.endswith(names)]


def _count_held(model: Any, setup: TrainingSetup) -> tuple[dict[str, float], float, float]:
    """Count the bytes held during the whole step, by term, of all gradients, and of their copies in float32."""

    def size(parameters: Iterable[nn.Parameter]) -> int:
        return sum(parameter.numel() for parameter in parameters)

    parameters, quantized = list(model.parameters()), _quantized_weights(model, setup)
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    num_trained, itemsize = size(trained), setup.compute_dtype.itemsize
    num_shards = 1 if setup.sharding in ("none", "ddp") else setup.num_gpus
    # Weights that are updated are float32 with DeepSpeed, and with FSDP and mixed precision.
    is_float32 = setup.uses_deepspeed or (setup.sharding == "fsdp2" and setup.mixed_precision)
    updated_bytes = 4 * num_trained if is_float32 else sum(parameter.nbytes for parameter in trained)
    trained_bytes = itemsize * num_trained if setup.uses_deepspeed else updated_bytes
    # DeepSpeed casts frozen weights, all others hold them as they are loaded.
    frozen_itemsize = itemsize if setup.uses_deepspeed else getattr(torch, setup.dtype).itemsize
    frozen_bytes = frozen_itemsize * (size(parameters) - num_trained - size(quantized))
    frozen_bytes += QUANTIZED_BYTES[setup.bits] * size(quantized)
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
    num_logits = max(setup.max_length - setup.images_per_sample * model.config.num_image_tokens, 1)
    lengths = dict.fromkeys(("input_ids", "attention_mask", "labels"), setup.max_length) | {"shift_labels": num_logits}
    # Batches of text have one black image, unless only the language model is trained.
    num_images = setup.batch_size * setup.images_per_sample or int(setup.stage != "language_model")
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
    setup = TrainingSetup(
        stage=model.stage,
        batch_size=training.per_device_train_batch_size,
        max_length=data.max_length,
        images_per_sample=images_per_sample,
        num_gpus=num_gpus,
        sharding=sharding or file_sharding or ("none" if num_gpus == 1 else "ddp"),
        dtype=model.dtype,
        mixed_precision=training.bf16 or training.fp16,
        gradient_checkpointing=bool(training.gradient_checkpointing),
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        lora_rank=model.lora_r if model.use_peft else None,
        bits=model.num_bits,
        # Flash attention requires a GPU, and takes the memory of sdpa.
        attention="eager" if model.attn_implementation == "eager" else "sdpa",
    )
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


def plan_known_runs() -> dict[str, MemoryPlan]:
    """Plan `KNOWN_RUNS`."""
    return {name: plan_memory(published_config(size), setup) for name, (size, setup) in KNOWN_RUNS.items()}


def published_config(size: str) -> FlorenceVLConfig:
    """The configuration of the published `8b`, with Llama-3.1-8B, or `3b`, with Phi-3.5-mini."""
    # Transformers' default of `phi3` is Phi-3-mini, with the shapes of Phi-3.5-mini.
    changes: dict[str, Any] = {"3b": {"text_config": {"model_type": "phi3"}, "image_token_id": 32011}, "8b": {}}
    return FlorenceVLConfig(**changes[size])


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
    lines.append(f"{gpus}, {setup.batch_size} samples of {setup.max_length} tokens.")
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
