# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Training steps, as `Trainer` runs them on a single device."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from florence_vl_hf.training.adapters import lora_config
from florence_vl_hf.training.collator import IGNORED_LABEL
from florence_vl_hf.training.stages import set_trainable
from florence_vl_hf.training.trainer import learned_positions

from .measuring import Row, compare
from .models import Setup


TEXT_LENGTH = 256
LORA_RANK = 16
# The name of a row, its training stage, and whether LoRA trains the language model.
RUNS = (
    ("frozen tower", "finetune", False),
    ("LoRA, frozen tower", "finetune", True),
    ("full", "pretrain", False),
)


def training(setup: Setup) -> Iterator[Row]:
    """Run training steps: forward, backward and AdamW."""
    for name, stage, with_lora in RUNS:
        # With new weights. Those of the last run are free by now.
        yield from steps(replace(setup), name, stage, with_lora)


def steps(setup: Setup, name: str, stage: str, with_lora: bool) -> Iterator[Row]:
    batch_size = min(2, setup.max_batch)
    # Contenders share the language model.
    model, peer = setup.model, setup.peer
    model.train()
    set_trainable(model, stage)
    peer.train()
    peer.model.vision_tower.requires_grad_(stage == "pretrain")
    trained: nn.Module = model
    if with_lora:
        trained = get_peft_model(model, lora_config(model, rank=LORA_RANK, train_projector=True))
        trained.train()
    batch = make_batch(setup, setup.config.num_image_tokens, setup.config.image_size, batch_size)
    clip = peer.config.vision_config
    peer_batch = make_batch(setup, (clip.image_size // clip.patch_size) ** 2, clip.image_size, batch_size)

    def loss() -> torch.Tensor:
        return trained(**batch, **learned_positions(batch["labels"])).loss

    def loss_of_original() -> torch.Tensor:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits = setup.original.logits(**inputs)[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())

    baselines = {"peer": training_step(peer, lambda: peer(**peer_batch).loss)}
    if stage != "pretrain":  # the original's tower generates, without gradients
        with torch.no_grad():
            model.eval()
            setup.check_equal(loss(), loss_of_original())
            model.train()
        baselines["original"] = training_step(model, loss_of_original)
    yield from compare(
        f"training step, {name}, batch {batch_size}",
        training_step(model, loss),
        baselines,
        setup.repeats,
        "samples/s",
        batch_size,
    )


def make_batch(setup: Setup, num_image_tokens: int, image_size: int, batch_size: int) -> dict[str, Any]:
    """Make samples of one image and random text, whose second half is learned."""
    generator = torch.Generator().manual_seed(1)
    shape = (batch_size, num_image_tokens + TEXT_LENGTH)
    first_text_id = setup.config.image_token_id + 1  # special tokens come first
    input_ids = torch.randint(first_text_id, len(setup.tokenizer), shape, generator=generator)
    input_ids[:, :num_image_tokens] = setup.config.image_token_id
    labels = input_ids.clone()
    labels[:, : num_image_tokens + TEXT_LENGTH // 2] = IGNORED_LABEL
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}
    moved = {name: tensor.to(setup.device) for name, tensor in batch.items()}
    return {**moved, "pixel_values": setup.pixel_values(batch_size, image_size)}


def training_step(model: nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """Return a function that trains the parameters that require gradients by one step."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def step() -> None:
        loss().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step
