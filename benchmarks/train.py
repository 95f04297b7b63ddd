# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Train a synthetic model on synthetic data, to measure the throughput and the peak memory of training settings."""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
import typer
from peft import get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers.trainer_pt_utils import get_length_grouped_indices

from florence_vl_hf import FlorenceVLConfig, FlorenceVLForConditionalGeneration
from florence_vl_hf.training.adapters import lora_config
from florence_vl_hf.training.collator import IGNORED_LABEL
from florence_vl_hf.training.stages import STAGES, set_trainable
from florence_vl_hf.training.trainer import learned_positions


MIB = 2**20


@dataclass(frozen=True)
class TrainingSetup:
    """Settings of a training run. By default, all parameters are trained in float32, and nothing is recomputed."""

    stage: str = "pretrain"
    batch_size: int = 4
    max_length: int = 256
    mixed_precision: bool = False
    gradient_checkpointing: bool = False
    lora_rank: int | None = None
    attention: str = "sdpa"


def small_config(**changes: Any) -> FlorenceVLConfig:
    """Configure a model of 18 million parameters, a third in the vision tower, with 37 tokens per 192 x 192 image."""
    settings: dict[str, Any] = {
        "vision_config": {
            "vision_config": {
                "embed_dim": [32, 64, 128, 256],
                "num_heads": [2, 4, 8, 16],
                "num_groups": [2, 4, 8, 16],
                "depths": [1, 1, 3, 1],
                "projection_dim": 192,
                "window_size": 12,
            },
            "text_config": {
                "model_type": "bart",
                "vocab_size": 51289 // 16,
                "d_model": 192,
                "encoder_layers": 4,
                "encoder_attention_heads": 6,
                "encoder_ffn_dim": 768,
                "max_position_embeddings": 256,
            },
        },
        "text_config": {
            "model_type": "llama",
            "vocab_size": 8192,
            "hidden_size": 256,
            "intermediate_size": 896,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        "image_size": 192,
        "image_token_id": 8191,
        "prompts": {"caption": "Describe.", "ocr": "Read.", "grounding": "Locate."},
        "prompt_token_ids": {"caption": [0, 7, 8, 2], "ocr": [0, 9, 2, 1], "grounding": [0, 10, 2, 1]},
    }
    return FlorenceVLConfig(**{**settings, **changes})


def make_model(config: FlorenceVLConfig, setup: TrainingSetup) -> nn.Module:
    """Build a model with random weights, prepared for training."""
    torch.manual_seed(0)
    model = FlorenceVLForConditionalGeneration._from_config(
        config, dtype=torch.float32, attn_implementation=setup.attention
    )
    model.config.text_config.use_cache = False
    model.train()
    set_trainable(model, setup.stage)
    if setup.lora_rank is not None:
        train_projector = "projector" in STAGES[setup.stage]
        model = get_peft_model(model, lora_config(model, rank=setup.lora_rank, train_projector=train_projector))
        model.train()
    if setup.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def make_batch(config: FlorenceVLConfig, lengths: list[int], padded_length: int) -> dict[str, torch.Tensor]:
    """Make a right-padded batch: one image per sample and random text, `lengths` tokens including the image tokens."""
    generator = torch.Generator().manual_seed(1)
    shape = (len(lengths), padded_length)
    input_ids = torch.randint(3, config.image_token_id, shape, generator=generator)
    input_ids[:, : config.num_image_tokens] = config.image_token_id
    mask = torch.arange(padded_length) < torch.tensor(lengths).unsqueeze(1)
    is_answer = mask & (input_ids != config.image_token_id)
    size = (len(lengths), 3, config.image_size, config.image_size)
    return {
        "input_ids": torch.where(mask, input_ids, 0),
        "attention_mask": mask.long(),
        "labels": torch.where(is_answer, input_ids, IGNORED_LABEL),
        "pixel_values": torch.randn(size, generator=generator),
    }


def make_step(
    model: nn.Module, setup: TrainingSetup
) -> tuple[Callable[[dict[str, torch.Tensor]], None], torch.optim.Optimizer]:
    """Return a function that runs one training step as `Trainer` does on a single device, and its optimizer."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step(batch: dict[str, torch.Tensor]) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=setup.mixed_precision):
            loss = model(**batch, **learned_positions(batch["labels"])).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, optimizer


def measure_peak(config: FlorenceVLConfig, setup: TrainingSetup) -> int:
    """
    Measure the peak memory of a training step on the CPU, in bytes.

    The profiler reports every allocation and deallocation of PyTorch's allocator. The second step is measured, since
    the optimizer allocates its moments in the first.
    """
    model = make_model(config, setup)
    step, optimizer = make_step(model, setup)
    lengths = [setup.max_length] * setup.batch_size
    lengths[0] -= 1  # One padded position, so that the attention mask is not dropped.
    step(make_batch(config, lengths, setup.max_length))
    moments = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    persistent = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers(), *moments))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        step(make_batch(config, lengths, setup.max_length))
    events = sorted(
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    return persistent + max(itertools.accumulate(num_bytes for _, num_bytes in events))


BASE = TrainingSetup()
SPEED_SETUPS = {
    "pretrain": BASE,
    "batches grouped by length": BASE,
    "gradient checkpointing": replace(BASE, gradient_checkpointing=True),
    "eager attention": replace(BASE, attention="eager"),
    "bf16": replace(BASE, mixed_precision=True),
    "finetune: frozen tower": replace(BASE, stage="finetune"),
    "LoRA": replace(BASE, stage="finetune", lora_rank=16),
}


def measure_speed(setup: TrainingSetup, grouped: bool, num_steps: int) -> float:
    """Measure samples per second, for samples of very different lengths."""
    config = small_config()
    step, _ = make_step(make_model(config, setup), setup)
    generator = torch.Generator().manual_seed(0)
    num_samples = num_steps * setup.batch_size
    min_length = config.num_image_tokens + 8
    fractions = torch.rand(num_samples, generator=generator) ** 2  # Many short samples, a few long ones.
    lengths = (min_length + fractions * (setup.max_length - min_length)).int().tolist()
    if grouped:
        order = get_length_grouped_indices(lengths, setup.batch_size, mega_batch_mult=num_steps, generator=generator)
        lengths = [lengths[i] for i in order]
    groups = [lengths[start : start + setup.batch_size] for start in range(0, num_samples, setup.batch_size)]
    batches = [make_batch(config, group, max(group)) for group in groups]
    step(batches[0])
    start = time.perf_counter()
    for batch in batches:
        step(batch)
    return num_samples / (time.perf_counter() - start)


def compare_speed(num_steps: int) -> None:
    """Print throughput and peak memory of each setup, and the ratio to the first."""
    typer.echo(f"{'':<28}{'samples/s':>12}{'ratio':>8}{'peak MiB':>12}{'ratio':>8}")
    first: tuple[float, int] | None = None
    for name, setup in SPEED_SETUPS.items():
        speed = measure_speed(setup, grouped="grouped" in name, num_steps=num_steps)
        peak = measure_peak(small_config(), setup)
        first = first or (speed, peak)
        typer.echo(f"{name:<28}{speed:>12.2f}{speed / first[0]:>8.2f}{peak / MIB:>12.0f}{peak / first[1]:>8.2f}")


def main(
    steps: Annotated[int, typer.Option(help="Training steps per measurement.", min=1)] = 8,
    threads: Annotated[int, typer.Option(help="Threads of PyTorch.", min=1)] = 2,
) -> None:
    """Measure training setups, and print a table."""
    torch.set_num_threads(threads)
    compare_speed(steps)


if __name__ == "__main__":
    typer.run(main)
