# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Command of `analysis.ablation`."""

import logging
import os
import sys
from typing import Annotated

import typer
from typer import Argument

from . import options


# Beginnings of what torchrun and accelerate set for each process.
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_", "FSDP_")


def ablate(
    grid: Annotated[str, Argument(help="YAML file of a recipe with variants and seeds.")],
    changes: options.Settings = None,
) -> None:
    """Train and evaluate variants of a model with several seeds. The same command resumes an interrupted grid."""
    if "LOCAL_RANK" in os.environ:
        _restart_alone(int(os.environ["LOCAL_RANK"]))
    from florence_vl_hf.analysis.ablation import ablate as run_grid
    from florence_vl_hf.training import read_recipe

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("florence_vl_hf").setLevel(logging.INFO)
    table = run_grid(read_recipe(grid, changes))
    typer.echo(table or "Other processes are working on the remaining runs; the last one writes the table.")


def _restart_alone(local_rank: int) -> None:
    """
    Start this process of a distributed run again as one that is not part of it, with one GPU.

    Each run of a grid is trained by one process. In a new process, no library has read the old environment.
    """
    import torch

    environment = {name: os.environ[name] for name in os.environ if not name.startswith(LAUNCHER_VARIABLES)}
    if num_gpus := torch.cuda.device_count():
        visible = environment.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(num_gpus)))
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[local_rank % num_gpus]
    os.execve(sys.executable, sys.orig_argv, environment)
