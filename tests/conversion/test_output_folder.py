# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import errno
import multiprocessing
import time
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from florence_vl_hf.conversion import CheckpointError, convert
from florence_vl_hf.conversion.output_folder import TensorToWrite, folder_in_place_when_complete, write_weights

from ..conftest import FIXTURES


LLAMA = FIXTURES / "llama-small"


def planned(tensors: dict[str, torch.Tensor]) -> dict[str, TensorToWrite]:
    return {
        name: TensorToWrite(tensor.dtype, tuple(tensor.shape), partial(torch.clone, tensor))
        for name, tensor in tensors.items()
    }


class TestWeights:
    @pytest.mark.parametrize("max_shard_size", ["1GB", 100])
    def test_safetensors_reads_what_was_written(self, max_shard_size, tmp_path):
        tensors = {
            "matrix": torch.randn(5, 7),
            "half": torch.randn(3, 1, 2).bfloat16(),
            "scalar": torch.tensor(3.5, dtype=torch.float64),
            "empty": torch.zeros(0, 4, dtype=torch.float16),
            "flags": torch.tensor([True, False]),
            "transposed": torch.arange(6).view(2, 3).T,
        }
        write_weights(tmp_path, planned(tensors), max_shard_size)
        files = sorted(tmp_path.glob("*.safetensors"))
        assert len(files) == 1 if max_shard_size == "1GB" else len(files) > 1
        read = {name: tensor for file in files for name, tensor in load_file(file).items()}
        assert read.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert read[name].dtype == tensor.dtype and read[name].equal(tensor), name

    def test_tensor_that_is_not_what_was_planned_is_an_error(self, tmp_path):
        wrong = {"matrix": TensorToWrite(torch.float32, (2, 2), partial(torch.zeros, 2, 3))}
        with pytest.raises(CheckpointError, match=r"matrix is a \(2, 3\)"):
            write_weights(tmp_path, wrong, "1GB")

    def test_holds_one_tensor_at_a_time(self, tmp_path):
        made: list[weakref.ref] = []

        def make(value: int) -> torch.Tensor:
            assert sum(reference() is not None for reference in made) <= 1  # the one that was written last
            tensor = torch.full((100,), float(value))
            made.append(weakref.ref(tensor))
            return tensor

        tensors = {f"t{i}": TensorToWrite(torch.float32, (100,), partial(make, i)) for i in range(5)}
        write_weights(tmp_path, tensors, "1GB")
        assert len(made) == 5


class TestFolder:
    def test_appears_when_it_is_complete(self, tmp_path):
        output = tmp_path / "deep" / "output"
        with folder_in_place_when_complete(output) as folder:
            (folder / "file").write_text("content")
            assert not output.exists()
        assert (output / "file").read_text() == "content"
        assert list(output.parent.iterdir()) == [output]

    def test_takes_the_place_of_an_empty_folder(self, tmp_path):
        (tmp_path / "output").mkdir()
        with folder_in_place_when_complete(tmp_path / "output") as folder:
            (folder / "file").write_text("content")
        assert (tmp_path / "output" / "file").exists()

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
    def test_leaves_nothing_when_it_fails(self, error, tmp_path):
        with pytest.raises(type(error)), folder_in_place_when_complete(tmp_path / "output") as folder:
            (folder / "file").write_text("content")
            raise error
        assert list(tmp_path.iterdir()) == []

    def test_never_overwrites(self, tmp_path):
        (tmp_path / "output").write_text("mine")
        with (
            pytest.raises(CheckpointError, match="exists already"),
            folder_in_place_when_complete(tmp_path / "output"),
        ):
            pytest.fail("must not begin")
        assert (tmp_path / "output").read_text() == "mine"


def _convert(output: Path) -> None:
    convert(LLAMA / "checkpoint", output, LLAMA / "vision_tower", max_shard_size="200KB")


def test_killed_at_any_moment_it_leaves_nothing_or_all(tmp_path):
    """A process is killed at many moments of a conversion; the next one finds the way free."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["florence_vl_hf.conversion", __name__])
    warm_up = processes.Process(target=_convert, args=(tmp_path / "warm-up",))
    warm_up.start()
    warm_up.join()
    start = time.perf_counter()
    whole = processes.Process(target=_convert, args=(tmp_path / "whole",))
    whole.start()
    whole.join()
    duration = time.perf_counter() - start
    files = sorted(file.name for file in (tmp_path / "whole").iterdir())

    output, num_cut_short, num_moments = tmp_path / "output", 0, 14
    for moment in range(num_moments):
        process = processes.Process(target=_convert, args=(output,))
        process.start()
        time.sleep(duration * (moment + 1) / num_moments)
        process.kill()
        process.join()
        if output.exists():
            assert sorted(file.name for file in output.iterdir()) == files
            break
        num_cut_short += any(".output.incomplete-" in path.name for path in tmp_path.iterdir())
    assert num_cut_short >= 3  # some were in the middle of their writing

    if not output.exists():
        _convert(output)
    assert sorted(file.name for file in output.iterdir()) == files
    assert not [path for path in tmp_path.iterdir() if "incomplete" in path.name]
    AutoModelForImageTextToText.from_pretrained(output)
    AutoProcessor.from_pretrained(output)
