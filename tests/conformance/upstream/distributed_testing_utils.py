# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Not in the sdist. Run a test in several processes, which communicate through gloo on the CPU."""

import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def run_distributed(world_size: int) -> Callable[[Callable], Callable]:
    """Return a decorator: the function then runs as `function(rank, *arguments)` in each of `world_size` processes."""

    def decorate(function: Callable) -> Callable:
        def run(*arguments: Any) -> None:
            with tempfile.TemporaryDirectory() as folder:
                torch.multiprocessing.spawn(_run, (world_size, folder, function, arguments), nprocs=world_size)

        return run

    return decorate


def _run(rank: int, world_size: int, folder: str, function: Callable, arguments: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    try:
        function(rank, *arguments)
    finally:
        dist.destroy_process_group()
