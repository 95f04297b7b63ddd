# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import pytest

from ..conftest import FIXTURES, status
from .conftest import run


class TestChat:
    @pytest.mark.slow
    def test_streams_answers_of_several_turns(self, tmp_path):
        assert run("convert", FIXTURES / "phi-small" / "checkpoint", tmp_path / "out").returncode == 0
        image = FIXTURES / "phi-small" / "images" / "odd.jpg"
        result = run("chat", tmp_path / "out", image, "--max-new-tokens", "4", stdin="What is it?\nSure?\n/exit\n")
        assert result.returncode == 0, result.stderr
        lines = result.stdout.split("\n")
        assert lines[0] == "> What is it?" and "> Sure?" in lines and lines[-2] == "> /exit"
        assert lines[1]

    def test_missing_image(self, capfd):
        assert status("chat", "anywhere", "no-such-image.png") == 2
        assert "no-such-image.png" in capfd.readouterr().err

    def test_missing_model(self, tmp_path, capfd):
        (tmp_path / "empty").mkdir()
        assert status("chat", tmp_path / "empty") == 1
        assert capfd.readouterr().err.strip().split("\n")[-1].startswith("florence-vl: error: ")
