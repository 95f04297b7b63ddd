# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Damaged files of every kind: the command works, or ends with one clear line, and leaves nothing behind."""

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from .harness import run_command, run_python
from .inputs import check_output


# Command and its arguments, and the files that are damaged.
COMMANDS: list[tuple[list[str], list[str]]] = [
    (["convert", "original", "output"], ["original/*", "original/vision_tower/*"]),
    (["convert", "original-phi", "output"], ["original-phi/*", "original-phi/vision_tower/*"]),
    (["export", "converted", "output"], ["converted/*"]),
    (["merge", "adapter", "output", "--base", "converted"], ["adapter/*", "converted/*"]),
    (["assemble", "--vision-tower", "tower", "--llm", "llm", "--output", "output"], ["tower/*", "llm/*"]),
    (["verify", "converted", "--reference", "reference/reference.safetensors"], ["reference/*", "converted/*"]),
    (["check-data", "data.json", "--image-folder", "images", "--model", "converted"], ["data.json"]),
    (["check-data", "data.jsonl", "--image-folder", "images", "--workers", "0"], ["data.jsonl", "images/*"]),
    (["train", "recipe.yaml"], ["recipe.yaml", "recipe.yaml", "data.json", "converted/*"]),
]
VALUES: list[Any] = [
    None,
    -1,
    0,
    1,
    2**31,
    5 * 10**6,
    10**9,
    10**30,
    1e308,
    float("nan"),
    float("inf"),
    -0.5,
    True,
    "",
    "x",
]
VALUES += [
    "x" * 5000,
    [],
    {},
    [1],
    ["a", None],
    {"a": {}},
    "../../etc/passwd",
    "mlp999999x_gelu",
    "(a+)+$",
    "\ud800",
    "é",
]


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.file}",)


def check_intact(directory: Path, inputs: Path) -> None:
    """Raise an error if a command fails with inputs that are not damaged: then its cases would try nothing."""
    for number, (command, _) in enumerate(COMMANDS):
        work = directory / f"intact-{number}"
        shutil.copytree(inputs, work, copy_function=os.link)
        result = run_command(command, directory / "log", enter=partial(os.chdir, work))
        if result.exit_code:
            raise RuntimeError(f"{' '.join(command)} fails: {result.output}")
        shutil.rmtree(work)


def check(random: Random, directory: Path, inputs: Path) -> str:
    command, patterns = random.choice(COMMANDS)
    work = directory / "work"
    # Hard links, so that only the damaged file is copied.
    shutil.copytree(inputs, work, copy_function=os.link)
    files = sorted(file for file in work.glob(random.choice(patterns)) if file.is_file())
    damaged, executed = random.choice(files), directory / "executed"
    change = _damage(random, damaged, executed)
    before = {file for file in work.rglob("*") if "output" not in file.relative_to(work).parts}

    result = run_command(command, directory / "log", enter=partial(os.chdir, work))
    context = f"{' '.join(command)} with {damaged.relative_to(work)} ({change}), exit code {result.exit_code}"
    if executed.exists():
        return f"{context}: code was executed"
    if problem := result.problem():
        return f"{context}: {problem}"
    output = work / "output"
    new = {f for f in work.rglob("*") if "output" not in f.relative_to(work).parts} - before
    if new and damaged.name != "recipe.yaml":  # which sets the output directory
        return f"{context}: left {sorted(str(file.relative_to(work)) for file in new)[:3]}"
    if command[0] in ("verify", "check-data"):
        return ""
    if result.exit_code and command[0] != "train" and output.exists():
        return f"{context}: left its output"
    if result.exit_code == 0 and not output.exists():
        return "" if damaged.name == "recipe.yaml" else f"{context}: no output"
    if result.exit_code == 0:
        loaded = run_python(lambda: check_output(command[0], output), directory / "log")
        if loaded.exit_code and command[0] not in ("export",):
            return f"{context}: the output does not load: {loaded.output[-300:]}"
    return ""


def _damage(random: Random, file: Path, executed: Path) -> str:
    content = file.read_bytes()
    file.unlink()  # the link: the original is shared by all cases
    is_json, kind = file.suffix == ".json", random.random()
    if is_json and kind < 0.75:
        file.write_text(json.dumps(_change_json(random, json.loads(content))))
        return f"changed, {random.getstate()[1][-1]}"
    if file.suffix in (".yaml", ".jsonl", ".jinja") and kind < 0.7:
        text, value = content.decode(), random.choice([*VALUES, "!!python/object/apply:os.system [id]", "&a [*a]"])
        lines = text.split("\n")
        i = random.randrange(len(lines))
        key = lines[i].partition(":")[0]
        if key == "max_steps" and isinstance(value, int):
            value = min(value, 2)  # a run of a billion steps is not wrong
        lines[i] = f"{key}: {value}" if file.suffix == ".yaml" else lines[i].replace('"', str(value)[:50], 1)
        file.write_text("\n".join(lines), errors="replace")
        return lines[i][:60]
    if file.suffix == ".safetensors" and kind < 0.6:
        file.write_bytes(_change_header(random, content))
        return "header"
    if file.suffix == ".bin" and kind < 0.6:
        file.write_bytes(_pickle(random, executed))
        return "pickle"
    match random.randrange(6):
        case 0:
            return "missing"
        case 1:
            file.write_bytes(b"")
            return "empty"
        case 2:
            file.mkdir()
            return "a directory"
        case 3:
            file.write_bytes(content[: random.randrange(len(content) + 1)])
            return "truncated"
        case 4:
            file.write_bytes(random.randbytes(random.choice([1, 100, 10_000])))
            return "random bytes"
        case _:
            flipped = bytearray(content)
            for _ in range(random.choice([1, 10])):
                if flipped:
                    flipped[random.randrange(len(flipped))] ^= 1 << random.randrange(8)
            file.write_bytes(bytes(flipped))
            return "flipped bits"


def _change_json(random: Random, value: Any) -> Any:
    if random.random() < 0.02:
        return random.choice(VALUES)
    if random.random() < 0.02:
        nested: Any = 1
        for _ in range(900):
            nested = [nested]
        return nested
    if isinstance(value, dict) and value:
        key = random.choice(list(value))
        if random.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: _change_json(random, value[key]) if random.random() < 0.8 else random.choice(VALUES)}
    if isinstance(value, list) and value:
        i = random.randrange(len(value))
        if random.random() < 0.1:
            return value[:i] + value[i + 1 :]
        return [*value[:i], _change_json(random, value[i]), *value[i + 1 :]]
    return random.choice(VALUES)


def _change_header(random: Random, content: bytes) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    name = random.choice(list(header))
    match random.randrange(6):
        case 0:
            return struct.pack("<Q", random.choice([0, 1, 2**63, len(content) * 2])) + content[8:]
        case 1:
            header[name] = random.choice(VALUES)
        case 2:
            header[name]["shape" if name != "__metadata__" else "format"] = random.choice(
                [[10**9, 10**9], [0], [-1], [1.5]]
            )
        case 3:
            header[name]["dtype"] = random.choice(["F64", "I64", "I8", "BOOL", "F8_E4M3", "x", None])
        case 4:
            header["../x"] = header.pop(name)
        case _:
            header.pop(name)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def _pickle(random: Random, executed: Path) -> bytes:
    payload = pickle.dumps({"weight": Payload(executed)}, protocol=2)
    if random.random() < 0.4:
        return payload
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", payload)
        file.writestr("archive/version", "3\n")
    return buffer.getvalue()
