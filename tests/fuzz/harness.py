# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Run cases in child processes with limits, and commands as a user runs them."""

import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any


# Limits of one command: seconds of processor time, and growth of its memory in KiB.
MAX_CPU_SECONDS = 20
MAX_MEMORY = 2**20
# Seconds for one case that is no command.
MAX_SECONDS = 10

# A case gets a random generator of its own and an empty directory, and returns what is wrong, or an empty text.
Case = Callable[[Random, Path], str]


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    exit_code: int  # negative: the number of the signal
    output: str  # of both streams
    seconds: float

    def problem(self) -> str:
        """Describe what a user must never see, or return an empty text."""
        last = self.output.strip().rpartition("\n")[2]
        if self.exit_code < 0:
            return f"ended by {signal.Signals(-self.exit_code).name}: {last[:300]}"
        if "Traceback (most recent call last)" in self.output:
            return f"traceback: {last[:300]}"
        if self.exit_code not in (0, 1):  # 2 is of arguments, which are right
            return f"unexpected exit code: {last[:300]}"
        if self.exit_code and not last:
            return "failed without a message"
        return f"message of {len(last)} characters: {last[:200]}" if len(last) > 1500 else ""


def run_command(
    arguments: list[str],
    log: Path,
    enter: Callable[[], object] = lambda: None,
    leave: Callable[[], object] = lambda: None,
    interrupt: tuple[float, signal.Signals] | None = None,
) -> Result:
    """
    Run `florence-vl` in a fork of this process, which has imported everything.

    `enter` and `leave` run in that process before and after the command. `interrupt` is a signal, and the seconds
    after which it is sent.
    """
    from florence_vl_cli import main

    return run_python(lambda: main(arguments), log, enter, leave, interrupt)


def run_python(
    function: Callable[[], object],
    log: Path,
    enter: Callable[[], object] = lambda: None,
    leave: Callable[[], object] = lambda: None,
    interrupt: tuple[float, signal.Signals] | None = None,
    max_cpu_seconds: int | None = MAX_CPU_SECONDS,
) -> Result:
    """Run a function as `run_command` runs a command."""
    start = time.monotonic()
    log.touch()  # the child may be killed before it opens it
    if (child := os.fork()) == 0:
        _run_child(function, log, enter, leave, max_cpu_seconds)
    if interrupt is not None:
        time.sleep(interrupt[0])
        os.kill(child, interrupt[1])
    _, status = os.waitpid(child, 0)
    return Result(os.waitstatus_to_exitcode(status), log.read_text(errors="replace"), time.monotonic() - start)


def _run_child(
    function: Callable[[], object],
    log: Path,
    enter: Callable[[], object],
    leave: Callable[[], object],
    max_cpu_seconds: int | None,
) -> None:
    code = 70
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout = open(1, "w", closefd=False)
        sys.stderr = open(2, "w", errors="backslashreplace", closefd=False)  # as Python opens it
        enter()
        if max_cpu_seconds is not None:
            resource.setrlimit(resource.RLIMIT_CPU, (max_cpu_seconds, max_cpu_seconds))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            function()
            code = 0
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else 0 if exit_.code is None else 1
        leave()
        if max_cpu_seconds and (grown := resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) > MAX_MEMORY:
            raise MemoryError(f"memory grew by {grown} KiB")
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds} seconds")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def run_cases(name: str, case: Case, seeds: range, seed: int, num_processes: int) -> dict[int, str]:
    """Run a case for each number, in several processes, and return what was wrong by number."""
    with tempfile.TemporaryDirectory(prefix=f"fuzz-{name}-") as directory, ThreadPoolExecutor(num_processes) as pool:
        chunks = [seeds[i::num_processes] for i in range(num_processes)]
        results = pool.map(lambda chunk: _run_chunk(name, case, chunk, seed, Path(directory)), chunks)
        return {number: problem for result in results for number, problem in result.items()}


def _run_chunk(name: str, case: Case, numbers: range, seed: int, directory: Path) -> dict[int, str]:
    """Run cases in a child process. One that dies is replaced, from the next case on."""
    wrong = {}
    report, log = (Path(tempfile.mkstemp(dir=directory)[1]) for _ in range(2))
    while numbers:
        result = run_python(partial(_work, name, case, numbers, seed, directory, report), log, max_cpu_seconds=None)
        # Each case adds its number when it begins, and what was wrong when it ends.
        lines = [json.loads(line) for line in report.read_text().splitlines()]
        wrong |= {number: problem for number, problem in lines if problem}
        if result.exit_code == 0:
            break
        last = lines[-1][0] if lines else numbers[0]
        wrong[last] = f"the process ended with {result.exit_code}: {result.output[-500:]}"
        numbers = numbers[numbers.index(last) + 1 :]
    return wrong


def _work(name: str, case: Case, numbers: range, seed: int, directory: Path, report: Path) -> None:
    with report.open("a", buffering=1) as file:
        for number in numbers:
            file.write(json.dumps([number, ""]) + "\n")
            workspace = Path(tempfile.mkdtemp(dir=directory))
            try:
                problem = case(Random(f"{name}-{seed}-{number}"), workspace)
            except Exception:
                problem = traceback.format_exc(limit=-3)
            file.write(json.dumps([number, problem]) + "\n")
            shutil.rmtree(workspace, ignore_errors=True)
