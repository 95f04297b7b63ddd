# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""What all commands have in common: help, versions, errors and exit codes."""

import subprocess
import sys
from importlib.metadata import version

import pytest
import typer

import florence_vl_cli as cli

from ..conftest import status
from .conftest import run


COMMANDS = [
    "align",
    "assemble",
    "chat",
    "check-data",
    "convert",
    "demo",
    "eval",
    "export",
    "merge",
    "predict",
    "push",
    "serve",
    "train",
    "verify",
]
HEAVY = {"torch", "transformers", "huggingface_hub", "numpy", "PIL", "florence_vl_hf"}
SCRIPT = f"""
import sys
from florence_vl_cli import main
try:
    main(sys.argv[1:])
finally:
    print({HEAVY} & set(sys.modules))
"""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)])
def test_help_and_version_import_neither_torch_nor_transformers(arguments):
    result = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("\nset()\n")


def test_runs_as_a_module():
    result = run("--version")
    assert result.returncode == 0 and result.stdout.startswith("florence_vl_hf ")


def test_help_lists_every_command(capfd):
    assert status("--help") == 0
    listed = capfd.readouterr().out
    assert [command for command in COMMANDS if command not in listed] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_documented(command):
    options = typer.main.get_command(cli.app).commands[command].params
    assert [option.name for option in options if not option.help] == []


def test_version(capfd):
    assert status("--version") == 0
    lines = [f"{name} {version(name)}" for name in ("florence_vl_hf", "transformers", "torch")]
    assert capfd.readouterr().out.split("\n")[:-1] == lines


class TestErrors:
    def test_traceback_on_demand(self, tmp_path):
        with pytest.raises(ValueError, match="neither a"):
            cli.main(["--traceback", "convert", "nowhere", str(tmp_path / "out")])

    def test_traceback_is_an_option_and_not_any_argument(self, tmp_path, capfd):
        assert status("convert", "nowhere", tmp_path / "out", "--chat-template", "--traceback") == 1
        assert capfd.readouterr().err.startswith("florence-vl: error: ")

    @pytest.mark.parametrize(
        ("error", "line"),
        [
            (ValueError("two\n  lines"), "two lines"),
            (ValueError(), "ValueError"),
            (KeyError("stage"), "KeyError: 'stage'"),
            (FileNotFoundError(2, "No such file", "here"), "[Errno 2] No such file: 'here'"),
        ],
    )
    def test_error_is_one_readable_line(self, error, line, monkeypatch, capfd):
        def fail(*args: object, **kwargs: object) -> None:
            raise error

        monkeypatch.setattr("florence_vl_hf.hub.push", fail)
        assert status("push", "model", "me/model") == 1
        assert capfd.readouterr().err == f"florence-vl: error: {line}\n"

    def test_wrong_use(self, capfd):
        assert status("convert") == 2
        assert status("convrt") == 2
        assert "convrt" in capfd.readouterr().err
