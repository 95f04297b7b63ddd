# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Answers of a model to a file of samples, which are kept when the run is interrupted."""

import glob
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import datasets
import numpy as np
import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..conversion import load_pretrained
from ..conversion.checkpoint_files import CHECKPOINT_FILES, locked, read_json, write_file
from ..training.data_loading import EVALUATION_FEATURES
from ..training.samples import SampleError
from .generation import generate_answers
from .questions import message_text, read_question
from .server import request_answers


# The first process to finish waits for the others.
MAX_WAITING_TIME = timedelta(days=7)


def predict(
    samples: datasets.Dataset,
    model: str | Path,
    output: str | Path,
    *,
    server: str | None = None,
    max_new_tokens: int = 512,
    batch_size: int = 8,
    dtype: torch.dtype | None = None,
    device: str = "auto",
    quantization_config: QuantizationConfigMixin | None = None,
) -> list[dict[str, Any]]:
    """
    Answer the last question of each sample greedily, and write the answers to a file.

    Answers of an interrupted run with the same arguments are kept in `OUTPUT.partial`, and not computed again; what
    these arguments were is in `OUTPUT.settings.json`. Under `accelerate launch`, each process answers a part.

    Args:
        samples (`datasets.Dataset`): Samples of `load_questions`.
        model (`str` or `Path`): Directory or Hub id of a model of any layout, or the server's name of its model.
        output (`str` or `Path`): A `.jsonl` file, which appears when it is complete.
        server (`str`, *optional*): URL of a server with OpenAI's API that answers instead.
        max_new_tokens (`int`, *optional*, defaults to 512): Maximum number of tokens of an answer.
        batch_size (`int`, *optional*, defaults to 8): Number of samples per batch, or of requests at the same time.
        dtype (`torch.dtype`, *optional*): Dtype of the weights. By default, that of the given model.
        device (`str`, *optional*, defaults to `"auto"`): Device of the model, if one process runs.
        quantization_config (*optional*): As in `from_pretrained`, such as one of `quantization.quantization_config`.

    Returns:
        `list[dict]`: In the order of `samples`: `id`, `question`, `images` (paths), `references` (reference answers),
        and `answer`; `error` in its place for a broken sample.

    Raises:
        ValueError: If `output` has answers of other arguments, or is not a file of answers.
        CheckpointError: If the model cannot be loaded, or another run is writing `output`.
        ConnectionError: If the server does not answer.
    """
    output = Path(output)
    if output.is_dir():
        raise ValueError(f"{output} is a directory; give the path of a .jsonl file.")
    # Without a dataset's own images, which are large.
    names = [name for name, kind in EVALUATION_FEATURES.items() if samples.features.get(name) == kind]
    texts = samples.select_columns(names)
    model_files = [file for pattern in CHECKPOINT_FILES for file in Path(model).glob(pattern) if server is None]
    settings = {
        "model": str(model),
        # In nanoseconds. A directory may hold another model later.
        "model_modified": max((file.stat().st_mtime_ns for file in model_files), default=None),
        "dtype": None if dtype is None else str(dtype),
        "quantization_config": None if quantization_config is None else quantization_config.to_dict(),
        "max_new_tokens": max_new_tokens,
        "num_samples": len(samples),
        "samples": hashlib.sha256("".join(map(_to_line, texts)).encode()).hexdigest(),
    }

    def answer(indices: list[int]) -> Iterator[tuple[int, str | SampleError]]:
        if server is not None:
            return request_answers(samples, indices, server, str(model), max_new_tokens, batch_size)
        device_map = device if state.num_processes == 1 else state.device
        loaded, processor = load_pretrained(
            model, dtype=dtype or "auto", device_map=device_map, quantization_config=quantization_config
        )
        return generate_answers(samples, indices, loaded.eval(), processor, max_new_tokens, batch_size)

    state = PartialState(cpu=device == "cpu", timeout=MAX_WAITING_TIME)
    with locked(output) if state.is_main_process else nullcontext():
        answered = {index for index, result in _read_partial(output).items() if "answer" in result}
        if answered or output.exists():
            _check_settings(output, settings)
        if not output.exists():
            state.wait_for_everyone()  # before any of them writes
            # The longest first: a batch that exceeds the memory fails at once.
            order = np.argsort(samples["length"], kind="stable")[::-1].tolist()
            remaining = [index for index in order if index not in answered]
            if state.is_main_process:
                write_file(_settings_file(output), json.dumps(settings, indent=2))
            if share := remaining[state.process_index :: state.num_processes]:
                progress = tqdm(total=len(share), desc="Answers", disable=not state.is_main_process)
                with progress, _open_partial(output, state.process_index) as file:
                    for index, result in answer(share):
                        key = "error" if isinstance(result, SampleError) else "answer"
                        file.write(_to_line({"index": index, key: str(result)}))
                        progress.update()
            state.wait_for_everyone()
            if state.is_main_process:
                known = _read_partial(output)
                lines = (_to_line(describe(sample) | known[index]) for index, sample in enumerate(texts))
                write_file(output, "".join(lines))
                for path in _partial_files(output):
                    path.unlink()
            state.wait_for_everyone()
    return [json.loads(line) for line in output.read_bytes().splitlines()]


def _check_settings(output: Path, settings: dict[str, Any]) -> None:
    """Refuse answers with other settings."""
    file = _settings_file(output)
    if not file.exists():
        raise ValueError(f"{output} is not from this command (there is no {file.name}); give another output.")
    known = read_json(file)
    changed = [name for name in settings if name not in known or known[name] != settings[name]]
    if changed:
        changes = "; ".join(f"{name} {known.get(name, 'unknown')}, now {settings[name]}" for name in changed)
        raise ValueError(
            f"{output} has answers with other settings ({changes}); give another output, or remove it with its "
            f"{output.name}.* files."
        )


def _settings_file(output: Path) -> Path:
    return output.with_name(f"{output.name}.settings.json")


def _partial_files(output: Path) -> list[Path]:
    """List files of answers, the last written one at the end."""
    return sorted(output.parent.glob(f"{glob.escape(output.name)}.partial*"), key=os.path.getmtime)


def _open_partial(output: Path, process_index: int) -> TextIO:
    number = f"-{process_index}" if process_index else ""
    file = open(output.with_name(f"{output.name}.partial{number}"), "a", encoding="utf-8", buffering=1)
    file.write("\n")  # ends a line that a killed run left incomplete
    return file


def _read_partial(output: Path) -> dict[int, dict[str, str]]:
    """Return the answers of interrupted runs by index. Errors may be gone in the next run, and do not replace them."""
    known: dict[int, dict[str, str]] = {}
    for path in _partial_files(output):
        for line in path.read_bytes().split(b"\n"):
            try:
                result = json.loads(line)
            except ValueError:  # empty, or incomplete
                continue
            index = result.pop("index")
            if "answer" in result or "answer" not in known.get(index, {}):
                known[index] = result
    return known


def describe(sample: dict[str, Any]) -> dict[str, Any]:
    """Return what is known of a sample before it is answered. Of a broken one, the question is empty."""
    question, references = "", list[str]()
    with suppress(SampleError):  # which is what its result says
        messages, references = read_question(sample)
        question = message_text(messages[-1]).strip()
    images = sample.get("images") or []
    return {"id": sample["id"], "question": question, "images": images, "references": references}


def _to_line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


__all__ = ["describe", "predict"]
