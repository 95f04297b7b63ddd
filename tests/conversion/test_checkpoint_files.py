# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import errno
import multiprocessing
import os
import signal
import time
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText, AutoProcessor

from florence_vl_hf.conversion import CheckpointError, checkpoint_files, convert
from florence_vl_hf.conversion.checkpoint_files import (
    LazyTensor,
    output_directory,
    read_json,
    read_tensor_file,
    read_tensors,
    write_tensors,
)

from .conftest import LLAMA


def lazy(tensor: torch.Tensor, name: str = "tensor") -> LazyTensor:
    return LazyTensor(name, Path("memory"), tensor.dtype, tuple(tensor.shape), lambda: tensor)


class TestLazyTensor:
    @pytest.fixture(params=[".safetensors", ".bin", None])
    def table(self, request, tmp_path, monkeypatch) -> tuple[LazyTensor, torch.Tensor]:
        """A table of 10 rows, padded in chunks of 3."""
        monkeypatch.setattr(checkpoint_files, "ROWS_PER_CHUNK", 3)
        tensor = torch.randn(10, 4)
        if request.param is None:
            return lazy(tensor), tensor
        path = tmp_path / f"model{request.param}"
        save = save_file if request.param == ".safetensors" else torch.save
        save({"table": tensor, "other": torch.zeros(3)}, path)
        return read_tensor_file(path)["table"], tensor

    def check(self, tensor: LazyTensor, expected: torch.Tensor) -> None:
        loaded = tensor.load()
        assert (tensor.dtype, tensor.shape) == (expected.dtype, tuple(expected.shape))
        assert loaded.dtype == expected.dtype and loaded.equal(expected)

    def test_operations(self, table):
        tensor, expected = table
        padding = torch.zeros(3, 4)
        self.check(tensor, expected)
        self.check(tensor.transposed(), expected.T)
        self.check(tensor.with_rows(7), expected[:7])
        self.check(tensor.with_rows(13), torch.cat([expected, padding]))
        self.check(tensor.to(torch.bfloat16), expected.bfloat16())

    def test_operations_compose_in_any_order(self, table):
        tensor, expected = table
        padded = torch.cat([expected, torch.zeros(3, 4)]).half()
        self.check(tensor.with_rows(13).to(torch.float16), padded)
        self.check(tensor.to(torch.float16).with_rows(13), padded)
        self.check(tensor.to(torch.float16).with_rows(13).transposed(), padded.T)
        self.check(tensor.transposed().with_rows(6), torch.cat([expected.T, torch.zeros(2, 10)]))
        self.check(tensor.with_rows(13).with_rows(4), expected[:4])

    def test_it_is_named_with_its_file(self, table):
        assert str(table[0]).split(" in ")[0] in ("table", "tensor")

    def test_a_padded_table_is_read_in_chunks(self, monkeypatch):
        """Source and result are never in memory together: each chunk is of a view that is dropped before the next."""
        monkeypatch.setattr(checkpoint_files, "ROWS_PER_CHUNK", 3)
        views: list[weakref.ref] = []
        expected = torch.randn(10, 4)

        def load() -> torch.Tensor:
            assert all(view() is None for view in views)
            view = expected.clone()
            views.append(weakref.ref(view))
            return view

        tensor = LazyTensor("table", Path("memory"), expected.dtype, (10, 4), load)
        self.check(tensor.with_rows(11), torch.cat([expected, torch.zeros(1, 4)]))
        assert len(views) == 4


def test_a_pytorch_file_is_reopened_now_and_then(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_files, "REOPEN_AFTER", 100)
    tensors = {f"t{i}": torch.randn(10) for i in range(10)}
    torch.save(tensors, tmp_path / "model.bin")
    opened = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: opened.append(args) or load(*args, **kwargs))
    read = {name: tensor.load() for name, tensor in read_tensor_file(tmp_path / "model.bin").items()}
    assert_close(read, tensors, rtol=0, atol=0)
    assert len(opened) == 4  # once to list them, and after each 3 tensors of 40 bytes


class TestWriting:
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
        write_tensors(tmp_path, {name: lazy(tensor, name) for name, tensor in tensors.items()}, max_shard_size)
        files = sorted(tmp_path.glob("*.safetensors"))
        assert len(files) == 1 if max_shard_size == "1GB" else len(files) > 1
        read = {name: tensor.load() for name, tensor in read_tensors(tmp_path).items()}
        assert read.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert read[name].dtype == tensor.dtype and read[name].equal(tensor), name
        with safe_open(files[0], framework="pt") as file:
            assert file.metadata() == {"format": "pt"}  # without which Transformers refuses it

    def test_tensors_that_share_memory(self, tmp_path):
        tensor = torch.randn(3, 3)
        write_tensors(tmp_path, {"one": lazy(tensor), "two": lazy(tensor)}, "1GB")
        assert_close(load_file(tmp_path / "model.safetensors"), {"one": tensor, "two": tensor}, rtol=0, atol=0)

    def test_one_shard_is_held_at_a_time(self, tmp_path):
        loaded: list[weakref.ref] = []

        def load(value: int) -> torch.Tensor:
            assert sum(reference() is not None for reference in loaded) <= 1
            tensor = torch.full((100,), float(value))
            loaded.append(weakref.ref(tensor))
            return tensor

        tensors = {f"t{i}": LazyTensor("", Path(), torch.float32, (100,), partial(load, i)) for i in range(6)}
        write_tensors(tmp_path, tensors, 2 * 400)
        assert len(loaded) == 6 and len(list(tmp_path.glob("*.safetensors"))) == 3


class TestOutputDirectory:
    def test_it_appears_when_it_is_complete(self, tmp_path):
        output = tmp_path / "deep" / "output"
        with output_directory(output) as directory:
            (directory / "file").write_text("content")
            assert not output.exists()
        assert (output / "file").read_text() == "content"
        assert list(output.parent.iterdir()) == [output]

    def test_it_replaces_an_empty_directory(self, tmp_path):
        (tmp_path / "output").mkdir()
        with output_directory(tmp_path / "output") as directory:
            (directory / "file").write_text("content")
        assert (tmp_path / "output" / "file").exists()

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
    def test_nothing_remains_when_it_fails(self, error, tmp_path):
        with pytest.raises(type(error)), output_directory(tmp_path / "output") as directory:
            (directory / "file").write_text("content")
            raise error
        assert list(tmp_path.iterdir()) == []

    def test_nothing_is_overwritten(self, tmp_path):
        (tmp_path / "output").write_text("mine")
        with pytest.raises(CheckpointError, match="exists already"), output_directory(tmp_path / "output"):
            pytest.fail("must not begin")
        assert (tmp_path / "output").read_text() == "mine"

    def test_only_leftovers_of_the_same_output_are_removed(self, tmp_path):
        """A name is no pattern: `g*` leaves alone what belongs to `good`."""
        for name in (".g*.incomplete", ".good.incomplete"):
            (tmp_path / name).mkdir()
        with output_directory(tmp_path / "g*"):
            pass
        assert sorted(path.name for path in tmp_path.iterdir()) == [".good.incomplete", "g*"]

    def test_a_second_run_on_the_same_output_is_refused(self, tmp_path, monkeypatch):
        output = tmp_path / "output"
        (tmp_path / "link").symlink_to(tmp_path)
        monkeypatch.chdir(tmp_path)
        with output_directory(output) as directory:
            (directory / "file").write_text("content")
            for same in (output, Path("output"), tmp_path / "link" / "output"):
                with pytest.raises(CheckpointError, match="Another run is writing"), output_directory(same):
                    pytest.fail("must not begin")
            with output_directory(tmp_path / "other"):
                pass
        assert (output / "file").read_text() == "content"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "other", "output"]

    def test_a_lock_file_without_a_process_does_not_block(self, tmp_path):
        (tmp_path / ".output.lock").touch()
        with output_directory(tmp_path / "output"):
            pass
        assert [path.name for path in tmp_path.iterdir()] == ["output"]

    def test_an_output_that_is_a_link_to_nothing(self, tmp_path):
        (tmp_path / "output").symlink_to(tmp_path / "elsewhere")
        with output_directory(tmp_path / "output") as directory:
            (directory / "file").touch()
        assert (tmp_path / "elsewhere" / "file").exists() and (tmp_path / "output" / "file").exists()

    @pytest.mark.parametrize("output", ["", "."])
    def test_the_current_directory_is_no_output(self, output, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with (
            pytest.raises(CheckpointError, match="give the path of a new output directory"),
            output_directory(Path(output)),
        ):
            pytest.fail("must not begin")


class TestJson:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "cannot be read as JSON"),
            ("[" * 100_000, "cannot be read as JSON"),
            ("[1]", "holds a JSON list, expected an object"),
            ("\udcff", "cannot be read as JSON"),
        ],
    )
    def test_damaged_files_are_named(self, content, message, tmp_path):
        (tmp_path / "config.json").write_text(content, encoding="utf-8", errors="surrogateescape")
        with pytest.raises(CheckpointError, match=f"config.json {message}"):
            read_json(tmp_path / "config.json")


def _convert(output: Path) -> None:
    convert(LLAMA.checkpoint, output, LLAMA.vision_tower, max_shard_size="200KB")


@pytest.fixture(scope="module")
def processes() -> Any:
    """Starts processes that have imported this package already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["florence_vl_hf.conversion", __name__])
    return context


@pytest.mark.parametrize(("signal_number", "exit_code"), [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, 1)])
def test_a_run_that_is_ended_by_a_signal_leaves_nothing(signal_number, exit_code, processes, tmp_path):
    begun = processes.Event()
    process = processes.Process(target=_write_for_ever, args=(tmp_path / "output", begun))
    process.start()
    assert begun.wait(60) and len(list(tmp_path.iterdir())) == 2  # the directory and the lock
    os.kill(process.pid, signal_number)
    process.join(60)
    assert process.exitcode == exit_code
    assert list(tmp_path.iterdir()) == []


def _write_for_ever(output: Path, begun: Any) -> None:
    with output_directory(output) as directory:
        (directory / "file").write_text("content")
        begun.set()
        time.sleep(600)


def test_a_run_that_fails_does_no_harm_to_one_that_is_stopped(processes, tmp_path):
    begun, go_on = processes.Event(), processes.Event()
    process = processes.Process(target=_write_in_two_steps, args=(tmp_path / "output", begun, go_on))
    process.start()
    assert begun.wait(60)
    with pytest.raises(CheckpointError, match="Another run is writing"):
        convert("nowhere", tmp_path / "output")
    go_on.set()
    process.join(60)
    assert process.exitcode == 0
    assert sorted(file.name for file in (tmp_path / "output").iterdir()) == ["config.json", "weights"]
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


def _write_in_two_steps(output: Path, begun: Any, go_on: Any) -> None:
    with output_directory(output) as directory:
        (directory / "weights").write_text("content")
        begun.set()
        assert go_on.wait(60)
        directory.mkdir(exist_ok=True)  # as `save_pretrained` does
        (directory / "config.json").write_text("{}")


def test_other_handlers_of_sigterm_are_kept(tmp_path):
    received = []
    previous = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        with output_directory(tmp_path / "output"):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert received == [signal.SIGTERM] and (tmp_path / "output").exists()


def test_a_conversion_that_is_killed_leaves_nothing_or_all(processes, tmp_path):
    """A process is killed at many moments of a conversion; the next conversion succeeds."""
    warm_up = processes.Process(target=_convert, args=(tmp_path / "warm-up",))
    warm_up.start()
    warm_up.join()
    start = time.perf_counter()
    complete = processes.Process(target=_convert, args=(tmp_path / "complete",))
    complete.start()
    complete.join()
    duration = time.perf_counter() - start
    files = sorted(file.name for file in (tmp_path / "complete").iterdir())

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
        num_cut_short += (tmp_path / ".output.incomplete").exists()
    assert num_cut_short >= 3  # some were in the middle of their writing

    if not output.exists():
        _convert(output)
    assert sorted(file.name for file in output.iterdir()) == files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["complete", "output", "warm-up"]
    AutoModelForImageTextToText.from_pretrained(output)
    AutoProcessor.from_pretrained(output)
