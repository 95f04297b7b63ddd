# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Memory plans of recipes and of known runs, as text and as a table."""

from pathlib import Path
from typing import Any

import yaml

from ..modeling import FlorenceVLConfig
from .arguments import parse_recipe
from .memory import GIB, OPTIMIZER, WEIGHTS, MemoryPlan, Sharding, TrainingSetup, plan_memory
from .step_trace import GRADIENTS, LOGITS


def read_setup(
    recipe: dict[str, Any],
    num_gpus: int | None = None,
    sharding: Sharding | None = None,
    accelerate_config: str | Path | None = None,
    images_per_sample: int = 1,
) -> tuple[str, dict[str, Any], TrainingSetup]:
    """
    What a recipe says about memory.

    Args:
        recipe (`dict[str, Any]`): As `read_recipe` gives it.
        num_gpus (`int`, *optional*): Instead of `accelerate_config`'s; 1 without either.
        sharding (`str`, *optional*): Instead of `accelerate_config`'s; without either, `none` on one GPU, else `ddp`.
        accelerate_config (`str` or `Path`, *optional*): The file that `accelerate launch` is given.
        images_per_sample (`int`, *optional*, defaults to 1): Pictures in each sample.

    Returns:
        `tuple[str, dict[str, Any], TrainingSetup]`: The model's folder or Hub id, what the recipe changes about its
        configuration, and the run.

    Raises:
        ValueError: If a setting is unknown, or one that this planning does not cover.
    """
    # What is said about devices is checked against the machine that trains, which need not be this one.
    of_devices = ("bf16", "fp16", "tf32", "use_cpu", "deepspeed", "fsdp", "fsdp_config", "accelerator_config")
    model, data, training = parse_recipe(
        {name: value for name, value in recipe.items() if name not in of_devices} | {"use_cpu": True}
    )
    if training.optim != "adamw_torch_fused":
        raise ValueError(
            f"`optim` is {training.optim.value!r}, but only what adamw_torch_fused takes is known here; add "
            f"`--set optim=adamw_torch_fused` to plan for that."
        )
    launched_gpus, launched_sharding = _read_accelerate_config(accelerate_config) if accelerate_config else (1, None)
    num_gpus = num_gpus or launched_gpus
    setup = TrainingSetup(
        stage=model.stage,
        batch_size=training.per_device_train_batch_size,
        max_length=data.max_length,
        images_per_sample=images_per_sample,
        num_gpus=num_gpus,
        sharding=sharding or launched_sharding or ("none" if num_gpus == 1 else "ddp"),
        dtype=model.dtype,
        mixed_precision=bool(recipe.get("bf16") or recipe.get("fp16")),
        gradient_checkpointing=training.gradient_checkpointing,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        lora_rank=model.lora_r if model.use_peft else None,
        bits=model.num_bits,
        attention="eager" if model.attn_implementation == "eager" else "sdpa",
    )
    return model.model_name_or_path, model.fusion_changes, setup


def _read_accelerate_config(path: str | Path) -> tuple[int, Sharding]:
    """Processes and sharding of a file of accelerate's."""
    launch = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    deepspeed, fsdp = launch.get("deepspeed_config") or {}, launch.get("fsdp_config") or {}
    num_gpus = launch.get("num_processes", 1)
    kind = launch.get("distributed_type", "NO")
    offloads = [deepspeed.get(name, "none") for name in ("offload_optimizer_device", "offload_param_device")]
    if set(offloads) != {"none"} or fsdp.get("fsdp_offload_params"):
        raise ValueError(
            f"{path} moves memory to the host, which is not covered here; plan without, then it needs less."
        )
    if kind == "NO":
        return num_gpus, "none"
    if kind == "MULTI_GPU":
        return num_gpus, "ddp"
    if kind == "FSDP" and fsdp.get("fsdp_version") == 2 and fsdp.get("fsdp_reshard_after_forward", True) is True:
        return num_gpus, "fsdp2"
    if kind == "DEEPSPEED" and deepspeed.get("zero_stage") in (2, 3):
        return num_gpus, f"zero{deepspeed['zero_stage']}"
    raise ValueError(
        f"{path} has distributed_type {kind} in a form that is not covered here; give MULTI_GPU, FSDP (version 2, "
        f"with fsdp_reshard_after_forward) or DEEPSPEED (zero_stage 2 or 3, set in the file)."
    )


# Phi-3.5-mini. Of its rotary positions nothing but their number takes memory.
PHI_3_5_MINI = {
    "model_type": "phi3",
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 131072,
    "pad_token_id": 32000,
}


def published_config(size: str) -> FlorenceVLConfig:
    """The shape of the published `8b` or `3b`."""
    if size == "8b":
        return FlorenceVLConfig()
    if size == "3b":
        return FlorenceVLConfig(text_config=PHI_3_5_MINI, image_token_id=32011)
    raise ValueError(f"Got the shape {size!r}, expected 8b or 3b.")


# The paper's four, and what fits on fewer GPUs.
KNOWN_RUNS = {
    "pretrain 8B": ("8b", TrainingSetup("pretrain", batch_size=16, num_gpus=128, sharding="zero3")),
    "pretrain 3B": ("3b", TrainingSetup("pretrain", batch_size=32, num_gpus=128, sharding="zero2")),
    "finetune 8B": (
        "8b",
        TrainingSetup("finetune", batch_size=8, num_gpus=32, sharding="zero2", gradient_accumulation_steps=2),
    ),
    "finetune 3B": (
        "3b",
        TrainingSetup("finetune", batch_size=32, num_gpus=32, sharding="zero2", gradient_accumulation_steps=4),
    ),
    "finetune 8B, one machine": ("8b", TrainingSetup("finetune", batch_size=4, num_gpus=8, sharding="fsdp2")),
    "finetune 3B, one machine": ("3b", TrainingSetup("finetune", batch_size=8, num_gpus=8, sharding="fsdp2")),
    "projector alone, 8B": ("8b", TrainingSetup("projector", batch_size=4)),
    "projector alone, 3B": ("3b", TrainingSetup("projector", batch_size=4)),
    "LoRA 8B": ("8b", TrainingSetup("finetune", batch_size=4, lora_rank=64)),
    "LoRA 3B": ("3b", TrainingSetup("finetune", batch_size=4, lora_rank=64)),
    "QLoRA 8B": ("8b", TrainingSetup("finetune", batch_size=2, lora_rank=64, bits=4)),
    "QLoRA 3B": ("3b", TrainingSetup("finetune", batch_size=2, lora_rank=64, bits=4)),
}


def plan_known_runs() -> dict[str, MemoryPlan]:
    """The plans of `KNOWN_RUNS`, by name."""
    return {name: plan_memory(published_config(size), setup) for name, (size, setup) in KNOWN_RUNS.items()}


# GiB of common GPUs.
GPU_SIZES = (24, 40, 48, 80)


def smallest_gpu(plan: MemoryPlan) -> str:
    """Of `GPU_SIZES`, the first that the plan fits."""
    return next((f"{size} GB" for size in GPU_SIZES if plan.fits(size)), f"more than {GPU_SIZES[-1]} GB")


def format_plan(plan: MemoryPlan) -> str:
    """A plan as text: what the parts are, what each term takes, and which GPUs have room."""
    setup = plan.setup
    lines = [
        f"{part.replace('_', ' '):<34} {total / 1e6:>10,.1f} million parameters, {trained / 1e6:,.1f} trained"
        for part, (total, trained) in plan.num_parameters.items()
    ]
    lines += [f"{name:<34} {size / GIB:>10.2f} GiB" for name, size in plan.terms.items()]
    lines.append(f"{'in all, per GPU':<34} {plan.total / GIB:>10.2f} GiB at the peak, in the {plan.peak}")
    lines.append(
        f"{setup.num_gpus} GPU{'s' * (setup.num_gpus > 1)}, {setup.sharding}, {setup.batch_size} samples of "
        f"{setup.max_length} positions on each. With a tenth left free it fits {smallest_gpu(plan)}."
    )
    return "\n".join(lines)


def format_table(plans: dict[str, MemoryPlan]) -> str:
    """Plans as a table in Markdown, in GiB per GPU."""
    columns = {
        "weights": (WEIGHTS, "gathered weights", "dequantized layer"),
        "optimizer": (OPTIMIZER, "master weights", "gradients in float32"),
        "gradients": (GRADIENTS, "communication"),
        "logits": (LOGITS,),
    }
    rows = [
        ["", "GPUs", "batch", "sharding", *columns, "activations", "**in all**", "GPU"],
        ["---", *["---:"] * 2, "---", *["---:"] * (len(columns) + 2), "---"],
    ]
    for name, plan in plans.items():
        sums = [sum(plan.terms.get(term, 0) for term in terms) for terms in columns.values()]
        sizes = [f"{size / GIB:.1f}" for size in (*sums, plan.total - sum(sums))]
        setup = plan.setup
        rows.append(
            [
                name,
                str(setup.num_gpus),
                str(setup.batch_size),
                setup.sharding,
                *sizes,
                f"**{plan.total / GIB:.1f}**",
                smallest_gpu(plan),
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


__all__ = [
    "KNOWN_RUNS",
    "format_plan",
    "format_table",
    "plan_known_runs",
    "published_config",
    "read_setup",
]
