# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""python -m benchmarks [PART ...] [--json FILE]"""

import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer

from .generation import decoding, first_token, growth, requests, second_turn
from .loading import conversion, loading
from .measuring import Row
from .models import TEXT_MODELS, Setup
from .training import training
from .vision import processor, vision


PARTS: dict[str, Callable[[Setup], Iterator[Row]]] = {
    part.__name__: part
    for part in (
        processor,
        vision,
        loading,
        conversion,
        first_token,
        decoding,
        requests,
        second_turn,
        training,
        growth,
    )
}
Part = StrEnum("Part", list(PARTS))
Text = StrEnum("Text", list(TEXT_MODELS))
Dtype = StrEnum("Dtype", ["float32", "bfloat16"])
MIB = 2**20
LAYOUT = "{:<46}{:<11}{:<11}{:>10}{:>10}{:>7}  {:<16}{}"


def machine(setup: Setup) -> dict[str, str | int | float]:
    """Describe what the numbers depend on, besides the code."""
    cpu = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "cores": os.cpu_count() or 0,
        "load": os.getloadavg()[0],
        "device": torch.cuda.get_device_name() if setup.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": str(setup.dtype).removeprefix("torch."),
        "text": "small" if setup.small else setup.text,
        "repeats": setup.repeats,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def main(
    parts: Annotated[list[Part] | None, typer.Argument(help="What to measure; by default everything.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the rows.", dir_okay=False)] = None,
    text: Annotated[Text, typer.Option(help="Language model.")] = Text.tiny,
    small: Annotated[bool, typer.Option("--small", help="Tiny models, to see that everything runs.")] = False,
    repeats: Annotated[int, typer.Option(help="Rounds of each measurement.", min=1)] = 5,
    device: Annotated[str, typer.Option(help="Such as `cpu` or `cuda`.")] = "cpu",
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the weights.")] = Dtype.float32,
    max_batch: Annotated[int, typer.Option(help="Leave larger batches out, which take long on a CPU.", min=1)] = 16,
    threads: Annotated[int, typer.Option(help="Threads of PyTorch on the CPU.", min=1)] = 2,
) -> None:
    """Compare Florence-VL's speed and memory with the original's way, a LLaVA, and the bare matrix products."""
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    setup = Setup(text.value, small, repeats, torch.device(device), getattr(torch, dtype.value), max_batch)
    result = {"machine": machine(setup), "rows": []}
    typer.echo(LAYOUT.format("", "unit", "baseline", "ours", "baseline", "ratio", "spread", "peak MiB"))
    for part in parts or PARTS:
        for row in PARTS[part](setup):
            low, high = row.spread
            numbers = (f"{row.ours:.3g}", f"{row.theirs:.3g}", f"{row.ratio:.2f}", f"{low:.2f} to {high:.2f}")
            memory = ""
            if row.memory_ours is not None and row.memory_theirs is not None:
                memory = f"{row.memory_ours / MIB:.0f}, {row.memory_theirs / MIB:.0f}"
            typer.echo(LAYOUT.format(row.name, row.unit, row.baseline, *numbers, memory))
            result["rows"].append(asdict(row))
            # After each row: a later one may need more memory than there is.
            if json_file is not None:
                json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(typer.run(main))
