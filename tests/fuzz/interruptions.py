# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Commands that are killed at any moment, or whose disk is full: their output is complete or does not exist."""

import ctypes
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

from .harness import Result, run_command, run_python
from .inputs import check_output


COMMANDS = {
    "convert": ["convert", "original", "made/output"],
    "export": ["export", "converted", "made/output"],
    "assemble": ["assemble", "--vision-tower", "tower", "--llm", "llm", "--output", "made/output"],
    "merge": ["merge", "adapter", "made/output", "--base", "converted"],
    "train": ["train", "recipe.yaml", "--set", "output_dir=made/output", "--set", "save_strategy=steps"],
}
CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000


def check_kill(random: Random, directory: Path, inputs: Path, command: str) -> str:
    made = _prepare(directory, inputs) / "made"
    output = made / "output"
    number = random.choice([signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
    delay = random.uniform(0, 1.1) * _uninterrupted(command, inputs)[0]
    result = _run(command, directory, interrupt=(delay, number))
    context = f"{command}, {number.name} after {delay:.2f} s, exit code {result.exit_code}"
    if "Traceback" in result.output:
        return f"{context}: traceback: {result.output[-300:]}"
    if number is not signal.SIGKILL and (left := _left(made)):
        return f"{context}: left {left}"
    if result.exit_code == 0 and not output.exists():
        return f"{context}: no output"
    if command == "train" or not output.exists():
        again = _run(command, directory)
        if again.exit_code:
            return f"{context}: the next run fails: {again.output[-300:]}"
        if left := _left(made):
            return f"{context}: the next run left {left}"
    return _check_complete(command, output, directory, context)


def check_full_disk(random: Random, directory: Path, inputs: Path, command: str) -> str:
    work, found = _prepare(directory, inputs), directory / "found"
    made = work / "made"
    size = int(random.uniform(0.02, 1) * _uninterrupted(command, inputs)[1] / 4096) * 4096

    # A file system of its own, which other processes do not see, and which ends with this one.
    result = _run(
        command,
        directory,
        enter=lambda: _mount(made, size),
        leave=lambda: found.write_text(" ".join(file.name for file in made.iterdir())),
    )
    context = f"{command} on a disk of {size:,} bytes, exit code {result.exit_code}"
    if problem := result.problem():
        return f"{context}: {problem}"
    names = found.read_text().split()
    if result.exit_code == 0:
        return "" if "output" in names else f"{context}: no output"
    left = [name for name in names if command != "train" and not name.endswith(".lock")]
    return f"{context}: left {left}" if left else ""


def _prepare(directory: Path, inputs: Path) -> Path:
    work = directory / "work"
    shutil.copytree(inputs, work, copy_function=os.link)
    (work / "made").mkdir()
    return work


def _run(command: str, directory: Path, enter: Callable[[], object] = lambda: None, **settings: Any) -> Result:
    def enter_work() -> None:
        os.chdir(directory / "work")
        enter()

    return run_command(COMMANDS[command], directory / "log", enter_work, **settings)


@cache
def _uninterrupted(command: str, inputs: Path) -> tuple[float, int]:
    """Return the seconds that a command takes, and the bytes that it writes."""
    with TemporaryDirectory() as directory:
        made = _prepare(Path(directory), inputs) / "made"
        result = _run(command, Path(directory))
        if result.exit_code:
            raise RuntimeError(f"{command} fails: {result.output}")
        return result.seconds, sum(file.stat().st_size for file in made.rglob("*") if file.is_file())


def _mount(directory: Path, size: int) -> None:
    libc, user = ctypes.CDLL(None, use_errno=True), os.getuid()
    if libc.unshare(CLONE_NEWNS | (0 if user == 0 else CLONE_NEWUSER)):
        raise OSError(ctypes.get_errno(), "a full disk requires a mount namespace of its own")
    if user:
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={max(size, 4096)}", "tmpfs", str(directory)], check=True)


def _left(made: Path) -> list[str]:
    return [file.name for file in made.iterdir() if file.name != "output" and not file.name.endswith(".lock")]


def _check_complete(command: str, output: Path, directory: Path, context: str) -> str:
    if command == "export":  # loads in the original's environment only
        return "" if (output / "config.json").is_file() else f"{context}: no config.json"
    loaded = run_python(lambda: check_output(command, output), directory / "log")
    return f"{context}: the output is not complete: {loaded.output[-300:]}" if loaded.exit_code else ""
