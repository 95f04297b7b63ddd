# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Convert a synthetic checkpoint of the original 8B's shape: time, peak memory, and the ratio to copying its bytes.

python benchmarks/convert.py --layers 8 --directory SCRATCH
"""

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from florence_vl_hf import FlorenceVLConfig
from florence_vl_hf.conversion.checkpoint_files import LazyTensor, write_tensors
from florence_vl_hf.conversion.key_mapping import to_original
from florence_vl_hf.conversion.original_checkpoint import tensor_shapes


GIB = 2**30
NUM_ROWS = 128257  # Llama-3.1's vocabulary size with `<pad>`


def make_checkpoint(directory: Path, num_layers: int, shard_size: str) -> int:
    """Write a checkpoint of random bits in the original format, and return its size in bytes."""
    config = FlorenceVLConfig()
    config.text_config.num_hidden_layers = num_layers
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        original = to_original(name)[0]
        shape = shape[::-1] if original.transposed else shape
        if shape[0] == config.text_config.vocab_size:
            shape = (NUM_ROWS, *shape[1:])
        load = partial(_random, shape)
        tensors[original.name] = LazyTensor(original.name, directory, torch.bfloat16, shape, load)
    directory.mkdir(parents=True)
    write_tensors(directory, tensors, shard_size)
    text = {
        name: value
        for name, value in config.text_config.to_dict().items()
        if isinstance(value, int | float | str) and name not in ("model_type", "dtype")
    }
    original = {
        **text,
        "model_type": "llava_llama",
        "vocab_size": NUM_ROWS,
        "mm_projector_type": "mlp3x_gelu",
        "mm_vision_tower": "florence",
        "image_aspect_ratio": "pad",
        "rope_theta": 500000.0,
    }
    (directory / "config.json").write_text(json.dumps(original))
    words = {f"w{i}": i for i in range(3, NUM_ROWS)}  # every row has a name, as in the 8B
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, **words}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(directory)
    return sum(tensor.num_bytes for tensor in tensors.values())


def _random(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16).view(torch.int16).random_(-15000, 15000).view(torch.bfloat16)


def copy_bytes(source: Path, target: Path) -> float:
    """Copy all files of weights, flush them to the disk, and return the seconds."""
    target.mkdir()
    start = time.perf_counter()
    for file in sorted(source.glob("*.safetensors")):
        shutil.copyfile(file, target / file.name)
    os.sync()
    return time.perf_counter() - start


def convert(source: Path, target: Path) -> tuple[float, float]:
    """Run the command as a user does, flush its output to the disk, and return seconds and peak memory in bytes."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "florence_vl_hf", "convert", str(source), str(target)])
    _, status, usage = os.wait4(process.pid, 0)  # of this process alone
    os.sync()
    if status:
        raise RuntimeError(f"The conversion failed with status {status}.")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def main(
    directory: Annotated[Path, typer.Option(help="Where to work; requires three times the checkpoint's size.")],
    layers: Annotated[int, typer.Option(help="Layers of the language model; the 8B has 32.")] = 8,
    shard_size: Annotated[str, typer.Option(help="Size of the original's shards.")] = "5GB",
    rounds: Annotated[int, typer.Option(help="Number of measurements; the fastest counts.")] = 3,
) -> None:
    """Measure and print a table."""
    source = directory / "original"
    # In a process of its own: a child's peak memory includes what its parent held when it was started.
    with ProcessPoolExecutor(1) as pool:
        num_bytes = pool.submit(make_checkpoint, source, layers, shard_size).result()
    copied, converted, peak = [], [], 0.0
    for _ in range(rounds):
        copied.append(copy_bytes(source, directory / "copy"))
        shutil.rmtree(directory / "copy")
        seconds, peak = convert(source, directory / "converted")
        converted.append(seconds)
        shutil.rmtree(directory / "converted")
    shutil.rmtree(source)
    largest = NUM_ROWS * 4096 * 2
    typer.echo(f"checkpoint         {num_bytes / GIB:8.2f} GiB, largest tensor {largest / GIB:.2f} GiB")
    typer.echo(f"copying            {min(copied):8.2f} s")
    typer.echo(f"converting         {min(converted):8.2f} s")
    typer.echo(f"ratio              {min(converted) / min(copied):8.2f}")
    typer.echo(
        f"peak memory        {peak / GIB:8.2f} GiB, {peak / GIB - largest / GIB:.2f} GiB besides the largest tensor"
    )


if __name__ == "__main__":
    typer.run(main)
