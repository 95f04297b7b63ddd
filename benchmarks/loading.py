# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Importing the package, loading a model, and converting a checkpoint."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Florence2ForConditionalGeneration,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from florence_vl_hf import FlorenceVLConfig, FlorenceVLForConditionalGeneration
from florence_vl_hf.conversion.checkpoint_files import LazyTensor, write_tensors
from florence_vl_hf.conversion.key_mapping import to_original
from florence_vl_hf.conversion.original_checkpoint import tensor_shapes

from .measuring import Row, compare, num_bytes
from .models import Setup, causal_lm


OURS = "from florence_vl_hf import FlorenceVLForConditionalGeneration, FlorenceVLProcessor"
ORIGINAL = "from transformers import AutoModelForCausalLM, CLIPImageProcessor, Florence2ForConditionalGeneration"
PEER = "from transformers import LlavaForConditionalGeneration, LlavaProcessor"
LIMIT = "import torch; from transformers import GenerationMixin"


def loading(setup: Setup) -> Iterator[Row]:
    """Import the classes of a model, build its modules, and load its weights."""

    def importing(statement: str) -> Callable[[], None]:
        return lambda: subprocess.run([sys.executable, "-c", statement], check=True, capture_output=True) and None

    yield from compare(
        "import",
        importing(OURS),
        {"original": importing(ORIGINAL), "peer": importing(PEER), "limit": importing(LIMIT)},
        setup.repeats,
        with_memory=False,
    )

    def building(*models: PreTrainedModel) -> Callable[[], None]:
        def build() -> None:
            with torch.device("meta"):  # without the time to initialize weights
                for model in models:
                    type(model)(model.config)

        return build

    language_model = causal_lm(setup.model)
    yield from compare(
        "building without weights",
        building(setup.model),
        {"original": building(setup.original.florence, language_model), "peer": building(setup.peer)},
        setup.repeats,
        with_memory=False,
    )
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        setup.model.save_pretrained(directory / "ours")
        setup.original.florence.save_pretrained(directory / "florence")
        language_model.save_pretrained(directory / "text")
        setup.peer.save_pretrained(directory / "peer")

        def ours() -> None:
            FlorenceVLForConditionalGeneration.from_pretrained(directory / "ours").to(setup.device)

        def original() -> None:
            Florence2ForConditionalGeneration.from_pretrained(directory / "florence").to(setup.device)
            AutoModelForCausalLM.from_pretrained(directory / "text").to(setup.device)

        def peer() -> None:
            LlavaForConditionalGeneration.from_pretrained(directory / "peer").to(setup.device)

        def read() -> dict[str, torch.Tensor]:
            files = sorted((directory / "ours").glob("*.safetensors"))
            return {name: tensor for file in files for name, tensor in load_file(file, str(setup.device)).items()}

        yield from compare(
            "from_pretrained",
            ours,
            {"original": original, "peer": peer, "limit": read},
            setup.repeats,
            details={"bytes": num_bytes(setup.model), "bytes of peer": num_bytes(setup.peer)},
        )


def conversion(setup: Setup) -> Iterator[Row]:
    """Convert a checkpoint of the original, against copying its bytes, both flushed to the disk."""
    with tempfile.TemporaryDirectory() as temporary:
        source, target = Path(temporary) / "original", Path(temporary) / "target"
        # In a process of its own: a child's peak memory includes what its parent held when it was started.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            size = pool.submit(make_checkpoint, setup.config, source).result()
        details: dict[str, float] = {"bytes": size, "peak memory": 0}

        def convert() -> None:
            command = [sys.executable, "-m", "florence_vl_hf", "convert", str(source), str(target)]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)  # of this process alone
            if status:
                raise RuntimeError(f"The conversion failed with status {status}: {' '.join(command)}")
            flush(target)
            details["peak memory"] = max(details["peak memory"], usage.ru_maxrss * 1024)
            shutil.rmtree(target)

        def copy() -> None:
            shutil.copytree(source, target)
            flush(target)
            shutil.rmtree(target)

        yield from compare("conversion", convert, {"limit": copy}, setup.repeats, with_memory=False, details=details)


def flush(directory: Path) -> None:
    """Wait until all files of a directory are on the disk."""
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def make_checkpoint(config: FlorenceVLConfig, directory: Path) -> int:
    """Write a checkpoint of random bits in the original format, and return its size in bytes."""
    num_rows = config.text_config.vocab_size - 1  # without `<image>`
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        original = to_original(name)[0]
        shape = shape[::-1] if original.transposed else shape
        if shape[0] == config.text_config.vocab_size:
            shape = (num_rows, *shape[1:])
        load = partial(_random, shape)
        tensors[original.name] = LazyTensor(original.name, directory, torch.bfloat16, shape, load)
    directory.mkdir(parents=True)
    write_tensors(directory, tensors, "5GB")
    text = {
        name: value
        for name, value in config.text_config.to_dict().items()
        if isinstance(value, int | float | str) and name not in ("model_type", "dtype")
    }
    original_config = {
        **text,
        "model_type": f"llava_{config.text_config.model_type}",
        "vocab_size": num_rows,
        "mm_projector_type": "mlp3x_gelu",
        "mm_vision_tower": "florence",
        "image_aspect_ratio": "pad",
        "rope_theta": 500000.0,
    }
    (directory / "config.json").write_text(json.dumps(original_config))
    words = {f"w{i}": i for i in range(3, num_rows)}  # every row has a name, as in the 8B
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, **words}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(directory)
    return sum(tensor.num_bytes for tensor in tensors.values())


def _random(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16).view(torch.int16).random_(-15000, 15000).view(torch.bfloat16)
