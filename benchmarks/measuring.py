# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Measurements: alternated timings, peak memory, and the matrix products of a computation."""

import gc
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode


aten = torch.ops.aten
Work = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """
    A measurement, with one baseline.

    Args:
        name (`str`): What is measured.
        unit (`str`): Unit of `ours` and `theirs`, such as `images/s`; or `s`.
        baseline (`str`): What it is compared with.
        ours, theirs (`float`): Medians of the two.
        ratio (`float`): How many times as fast ours is: the median over rounds, each of which runs both.
        spread (`tuple[float, float]`): The smallest and the largest ratio of a round.
        memory_ours, memory_theirs (`int`, *optional*): Most bytes of PyTorch's memory that a run allocates at a
            time, besides what was allocated before, such as the weights.
        details (`dict[str, float]`): Other numbers, such as floating point operations.
    """

    name: str
    unit: str
    baseline: str
    ours: float
    theirs: float
    ratio: float
    spread: tuple[float, float]
    memory_ours: int | None = None
    memory_theirs: int | None = None
    details: dict[str, float] = field(default_factory=dict)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def elapsed(work: Work) -> float:
    """Do the work, and return its seconds."""
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def own_seconds(work: Work) -> float:
    """Do work that measures itself and returns its seconds."""
    return work()


def compare(
    name: str,
    ours: Work,
    baselines: dict[str, Work],
    repeats: int,
    unit: str = "s",
    amount: float | None = None,
    seconds: Callable[[Work], float] = elapsed,
    check_original: Callable[[Any, Any], None] | None = None,
    with_memory: bool = True,
    details: dict[str, float] | None = None,
) -> Iterator[Row]:
    """
    Measure ours and its baselines in turn, so that a change of the machine's speed reaches all of them.

    Args:
        name (`str`): What is measured.
        ours (`Callable`): The work to measure.
        baselines (`dict[str, Callable]`): The work of each baseline.
        repeats (`int`): Number of rounds, after one for warming up, in which memory is measured.
        unit (`str`, *optional*, defaults to `"s"`): Unit of the reported numbers.
        amount (`float`, *optional*): What one run processes, in the unit's numerator. By default, seconds are
            reported.
        seconds (`Callable`, *optional*): Does the work and returns its seconds.
        check_original (`Callable`, *optional*): Raises an error if the outputs of ours and of `baselines["original"]`
            differ.
        with_memory (`bool`, *optional*, defaults to `True`): Whether the work runs in this process, with PyTorch.
        details (`dict[str, float]`, *optional*): Further numbers of each row.
    """
    contenders = {"ours": ours, **baselines}
    outputs, memory = {}, dict.fromkeys(contenders)
    for contender, work in contenders.items():
        if with_memory:
            outputs[contender], memory[contender] = peak_memory(work)
        else:
            outputs[contender] = work()
    if check_original is not None:
        check_original(outputs["ours"], outputs["original"])
    outputs.clear()
    times: dict[str, list[float]] = {contender: [] for contender in contenders}
    for _ in range(repeats):
        for contender, work in contenders.items():
            times[contender].append(seconds(work))

    def reported(contender: str) -> float:
        middle = median(times[contender])
        return middle if amount is None else amount / middle

    for baseline in baselines:
        ratios = [theirs / our for our, theirs in zip(times["ours"], times[baseline], strict=True)]
        yield Row(
            name,
            unit,
            baseline,
            reported("ours"),
            reported(baseline),
            median(ratios),
            (min(ratios), max(ratios)),
            memory["ours"],
            memory[baseline],
            details or {},
        )


def peak_memory(work: Work) -> tuple[Any, int]:
    """Do the work, and return its output and the most bytes of PyTorch's memory that it allocated at a time."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output = work()
        return output, torch.cuda.max_memory_allocated() - before
    # On the CPU, the profiler reports each allocation and deallocation.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        output = work()
    events = sorted(
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    del profiler
    gc.collect()  # of the profiler's events, which would slow down what is measured next
    return output, max(itertools.accumulate((num_bytes for _, num_bytes in events), initial=0))


class Products(TorchDispatchMode):
    """
    Record the matrix products and convolutions of a computation, to run them again without anything else.

    Weights are kept, since reading them takes time. Of other operands the shapes are kept.

    Args:
        model (`torch.nn.Module`): The model of the computation, whose parameters are the weights.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._calls: list[tuple[Callable[..., Any], list[Any], dict[str, Any]]] = []
        self.flops = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function not in _RECORDED:
            decomposed = function.decompose(*args, **kwargs)
            if decomposed is not NotImplemented:
                return decomposed
        output = function(*args, **kwargs)
        if function in (aten.mm.default, aten.addmm.default):
            self._add(torch.mm, args[-2:])
        elif function in (aten.bmm.default, aten.baddbmm.default):
            self._add(torch.bmm, args[-2:])
        elif function in _ATTENTION:
            query, key, value = (states.flatten(0, 1) for states in args[:3])
            key = key.repeat_interleave(len(query) // len(key), dim=0)
            value = value.repeat_interleave(len(query) // len(value), dim=0)
            self._add(torch.bmm, (query, key.transpose(1, 2)))
            self._add(torch.bmm, (query.new_empty(len(query), query.shape[1], key.shape[1]), value))
        elif function is aten.convolution.default:
            names = ("stride", "padding", "dilation")
            image, weight, _, *settings = args
            options = dict(zip(names, settings, strict=False)) | {"groups": args[8]}
            self._calls.append((torch.nn.functional.conv2d, [self._operand(image), self._operand(weight)], options))
            self.flops += 2 * output.numel() * prod(weight.shape[1:])
        return output

    def _add(self, function: Callable[..., Any], operands: tuple[torch.Tensor, ...]) -> None:
        first, second = operands
        self._calls.append((function, [self._operand(first), self._operand(second)], {}))
        self.flops += 2 * first.numel() * second.shape[-1]

    def _operand(self, tensor: torch.Tensor) -> Any:
        """Keep a weight; of any other tensor its shape, dtype and device."""
        if tensor.untyped_storage().data_ptr() in self._weights:
            return tensor.detach()
        return tuple(tensor.shape), tensor.dtype, tensor.device

    def replay(self) -> Callable[[], None]:
        """Return a function that computes the products, with one tensor for all operands of one shape."""
        tensors: dict[Any, torch.Tensor] = {}

        def tensor_of(operand: Any) -> torch.Tensor:
            if isinstance(operand, torch.Tensor):
                return operand
            if operand not in tensors:
                shape, dtype, device = operand
                tensors[operand] = torch.randn(shape, dtype=dtype, device=device)
            return tensors[operand]

        calls = [(function, [tensor_of(i) for i in operands], options) for function, operands, options in self._calls]

        def run() -> None:
            with torch.no_grad():
                for function, operands, options in calls:
                    function(*operands, **options)

        return run


_ATTENTION = (
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
)
_RECORDED = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.convolution.default,
    *_ATTENTION,
}


def record_products(model: torch.nn.Module, work: Callable[[], Any]) -> Products:
    """Run the work once, and return its matrix products."""
    with torch.no_grad(), Products(model) as products:
        work()
    return products


def num_bytes(module: torch.nn.Module) -> int:
    """Size of a module's parameters in bytes."""
    return sum(parameter.nbytes for parameter in module.parameters())
