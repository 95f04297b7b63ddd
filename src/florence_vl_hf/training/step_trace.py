# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""The bytes that a training step makes and drops, watched while it runs on tensors without data."""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils.operations import convert_outputs_to_fp32
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


GRADIENTS, LOGITS = "gradients", "logits and loss"


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operators make, from when they are made until nothing refers to them."""

    def __init__(self, gradient_share: float) -> None:
        super().__init__()
        self.gradient_share = gradient_share  # of each gradient's bytes that stay on this GPU
        self.label = "batch"
        self.phase = "forward"
        self.live: Counter[str] = Counter()
        self.peak: tuple[float, dict[str, float], str] = (-1.0, {}, self.phase)
        self._labels: dict[int, str | None] = {}

    def ignore(self, tensor: torch.Tensor) -> None:
        """Leave a tensor out that was made before: it is counted elsewhere."""
        self._watch(tensor.untyped_storage(), None)

    def relabel(self, tensor: torch.Tensor, label: str) -> None:
        """Count a tensor's bytes under another label."""
        storage = tensor.untyped_storage()
        if old := self._labels.get(id(storage)):
            self.live[old] -= storage.nbytes()
            self.live[label] += storage.nbytes()
            self._labels[id(storage)] = label

    def _watch(self, storage: torch.UntypedStorage, label: str | None) -> None:
        key, size = id(storage), storage.nbytes()
        self._labels[key] = label
        if label:
            self.live[label] += size
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        if label := self._labels.pop(key, None):
            self.live[label] -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for output in tree_leaves(outputs):
            if isinstance(output, torch.Tensor):
                storage = output.untyped_storage()
                if id(storage) not in self._labels:
                    self._watch(storage, self.label)
        total = sum(self.live.values()) - (1 - self.gradient_share) * self.live[GRADIENTS]
        if total > self.peak[0]:
            live = {**self.live, GRADIENTS: self.gradient_share * self.live[GRADIENTS]}
            self.peak = (total, live, self.phase)
        return outputs


def trace_step(
    model: nn.Module,
    batch_shape: tuple[int, int],
    num_images: int,
    gradient_share: float = 1.0,
    autocast: bool = False,
) -> tuple[dict[str, float], str]:
    """
    Run one forward and backward pass, and say what was alive when most was.

    Args:
        model (`nn.Module`): A Florence-VL with a head, its tensors of the active `FakeTensorMode`.
        batch_shape (`tuple[int, int]`): Samples, and positions of each.
        num_images (`int`): Pictures in the batch.
        gradient_share (`float`, *optional*, defaults to 1.0): How many of a gradient's bytes stay on this GPU.
        autocast (`bool`, *optional*, defaults to `False`): Whether the forward runs under autocast to bfloat16.

    Returns:
        `tuple[dict[str, float], str]`: Bytes by what they are, without the model's own; and `forward` or `backward`.
    """
    watch = LiveBytes(gradient_share)
    for tensor in (*model.parameters(), *model.buffers()):
        watch.ignore(tensor)
    with _labelled(model, watch), watch:
        batch = _make_batch(model, batch_shape, num_images)
        forward = model.forward
        if autocast:
            # In this order, as accelerate wraps a model.
            forward = convert_outputs_to_fp32(torch.autocast("cpu", dtype=torch.bfloat16)(forward))
        loss = forward(**batch).loss
        watch.phase = "backward"
        loss.backward()
    return watch.peak[1], watch.peak[2]


def _make_batch(model: nn.Module, shape: tuple[int, int], num_images: int) -> dict[str, torch.Tensor]:
    """A full batch, with the mask of one that is padded: attention then holds a number per pair of positions."""
    batch = {name: torch.zeros(shape, dtype=torch.long) for name in ("input_ids", "attention_mask", "labels")}
    # As `FlorenceVLTrainer` has it (`learned_positions`), where all text is learned and all pictures come first.
    num_image_positions = num_images // shape[0] * model.config.num_image_tokens
    batch["logits_to_keep"] = torch.arange(max(num_image_positions - 1, 0), shape[1])
    batch["shift_labels"] = torch.zeros((shape[0], len(batch["logits_to_keep"])), dtype=torch.long)
    if num_images:
        batch["pixel_values"] = torch.zeros(num_images, *model.model.vision_tower.image_shape)
    return batch


@contextmanager
def _labelled(model: nn.Module, watch: LiveBytes) -> Iterator[None]:
    """Tell what is made by the part of the model that made it, and stand in for what reads data out of tensors."""
    florence = model.model
    florence.get_placeholder_mask = lambda input_ids, embeds, features: (input_ids == 0).unsqueeze(-1)
    labels = {
        florence.vision_tower: "activations of the tower",
        florence.multi_modal_projector: "activations of the projector",
        florence.language_model: "activations of the language model",
        model.lm_head: LOGITS,
    }

    def enter(module: nn.Module, args: tuple) -> None:
        if watch.phase == "forward":
            watch.label = labels[module]
        if module is model.lm_head and args[0].requires_grad:
            args[0].register_hook(leave_head)

    def leave_head(gradient: torch.Tensor) -> None:
        watch.label = "backward pass of a layer"

    def take_gradient(parameter: nn.Parameter) -> None:
        watch.relabel(parameter.grad, GRADIENTS)

    handles = [module.register_forward_pre_hook(enter) for module in labels]
    handles += [p.register_post_accumulate_grad_hook(take_gradient) for p in model.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


__all__ = ["GRADIENTS", "LiveBytes", "trace_step"]
