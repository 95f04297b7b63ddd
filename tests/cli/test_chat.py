# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from florence_vl_cli import app

from ..conftest import status


def chat(model: Path, *arguments: str | Path, lines: list[str] | bytes) -> Result:
    """Run `florence-vl chat` with lines of input that are not typed on a terminal."""
    typed = lines if isinstance(lines, bytes) else "".join(f"{line}\n" for line in lines)
    options = ["--device", "cpu", "--max-new-tokens", "4"]
    arguments = ["chat", *map(str, (model, *arguments)), *options]
    return CliRunner().invoke(app, arguments, input=typed, obj={"traceback": False})


class Terminal:
    """`florence-vl chat` on a pseudo-terminal."""

    def __init__(self, *arguments: str | Path) -> None:
        self.master, slave = pty.openpty()
        command = [sys.executable, "-m", "florence_vl_hf", "chat", *map(str, arguments)]
        environment = {**os.environ, "TERM": "xterm"}
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env=environment,
            preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # becomes the controlling terminal
        )  # fmt: skip
        os.close(slave)
        self.shown = ""

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def wait_for(self, pattern: str, timeout: float = 120) -> str:
        """Return what is shown up to a pattern, which the next call does not see."""
        end = time.monotonic() + timeout
        while (found := re.search(pattern, self.shown, re.DOTALL)) is None:
            assert time.monotonic() < end, self.shown
            if select.select([self.master], [], [], 1)[0]:
                self.shown += os.read(self.master, 4096).decode(errors="replace")
        before, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return before


class TestChat:
    def test_answers_several_turns(self, converted, golden):
        result = chat(converted, golden.image_path("odd.jpg"), lines=["What is it?", "", "Sure?", "/exit", "after"])
        assert result.exit_code == 0, result.output
        assert "/exit" in result.stdout.split("> ")[0]  # says how to leave before the first question
        shown = [part.split("\n") for part in result.stdout.split("> ")[1:]]
        assert [part[0] for part in shown] == ["What is it?", "", "Sure?", "/exit"]
        assert shown[0][1] and shown[2][1]

    def test_end_of_input_ends_the_chat(self, converted):
        assert chat(converted, lines=b"Hello").exit_code == 0
        assert chat(converted, lines=b"").exit_code == 0

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (b"What does <image> mean?", "<image> stands for an image"),
            (b"word " * 20_000, "the model supports"),
            (b"\xff\xfe \xed\xa0\x80", None),
            (b"\x00\x01\x1b[A\x7f", None),
            (b"/unknown thing", "there is no command /unknown"),
            (b"/image", "There is no image"),
            (b"/image nowhere.png", "There is no image nowhere.png"),
            (b"/image http://127.0.0.1:9/a.png", "http://127.0.0.1:9/a.png cannot be read as an image"),
        ],
    )
    def test_survives_any_line(self, line, message, converted):
        result = chat(converted, lines=line + b"\nStill there?\n")
        assert result.exit_code == 0, result.output
        [error] = [text for text in result.stderr.split("\n") if text.startswith("error: ")] or [None]
        assert error is None if message is None else message in error
        assert result.stdout.rstrip("> \n").rpartition("> Still there?\n")[2].strip()

    def test_commands(self, converted, golden):
        image = golden.image_path("odd.jpg")
        lines = ["Hello", f"/image '{image}'", "What is it?", "/reset", "Hello", "/help"]
        result = chat(converted, lines=lines)
        assert result.exit_code == 0 and "error" not in result.stderr
        hello, added, about_image, reset, hello_again, shown, _ = result.stdout.split("> ")[1:]
        assert "part of your next question" in added and "forgotten" in reset and "/image PATH_OR_URL" in shown
        assert hello == hello_again != about_image

    def test_image_of_the_command_line_is_that_of_the_command(self, converted, golden):
        image = golden.image_path("odd.jpg")
        at_start = chat(converted, image, lines=["What is it?"]).stdout.split("> What is it?\n")[1]
        assert chat(converted, lines=[f"/image {image}", "What is it?"]).stdout.endswith(at_start)
        assert not chat(converted, lines=["What is it?"]).stdout.endswith(at_start)

    def test_missing_image_is_found_before_the_model_loads(self, capfd):
        assert status("chat", "anywhere", "no-such-image.png") == 1
        assert capfd.readouterr().err == (
            "florence-vl: error: There is no image no-such-image.png; give the path of a file, or a URL (http or "
            "https).\n"
        )

    def test_missing_model(self, tmp_path, capfd):
        (tmp_path / "empty").mkdir()
        assert status("chat", tmp_path / "empty") == 1
        assert capfd.readouterr().err.strip().split("\n")[-1].startswith("florence-vl: error: ")

    @pytest.mark.slow
    @pytest.mark.parametrize("golden", ["llama-small"], indirect=True, scope="session")
    def test_on_a_terminal(self, converted):
        terminal = Terminal(converted, "--device", "cpu", "--max-new-tokens", "4000")
        assert "/exit" in terminal.wait_for("> ")
        # An answer that Ctrl-C stops.
        terminal.type("Tell me more\n")
        terminal.wait_for("Tell me more.*\n.*\\S")
        terminal.type("\x03")
        assert "[transformers]" not in terminal.wait_for("Stopped.*> ")
        # The line before it, recalled and edited.
        terminal.type("\x1b[A!\x01Please: \n")
        line, _, answer = terminal.wait_for("\n.*\\S").partition("\n")
        assert line.startswith("Tell me more!") and "Please: " in line and answer.strip()
        terminal.type("\x03")
        terminal.wait_for("Stopped.*> ")
        # Ctrl-C at the prompt.
        terminal.type("half a question")
        terminal.wait_for("half a question")
        terminal.type("\x03")
        terminal.wait_for("Ctrl-D or /exit leaves the chat.*> ")
        terminal.type("\x04")
        assert terminal.process.wait(60) == 0
