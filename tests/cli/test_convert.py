# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import pytest
from transformers import AutoModelForImageTextToText

from florence_vl_hf.conversion.reference import RECORD_SCRIPT

from ..conftest import FIXTURES, status
from .conftest import run


LLAMA = FIXTURES / "llama-small"


class TestConvert:
    def test_output_loads(self, tmp_path, capfd):
        output = tmp_path / "out"
        arguments = ["--vision-tower", LLAMA / "vision_tower", "--dtype", "float32", "--max-shard-size", "1MB"]
        assert status("convert", LLAMA / "checkpoint", output, *arguments) == 0
        printed = capfd.readouterr()
        assert "Wrote" in printed.out and "10 tokens per image of 96 x 96" in printed.out
        assert "Writing weights" in printed.err
        assert (output / "model.safetensors.index.json").exists()
        assert AutoModelForImageTextToText.from_pretrained(output, dtype="auto").config.image_size == 96

    @pytest.mark.slow
    def test_says_what_is_assumed(self, tmp_path):
        result = run("convert", LLAMA / "checkpoint", tmp_path / "out")
        assert result.returncode == 0
        assert "config.json" in result.stderr and "--vision-tower" in result.stderr
        assert "577 tokens" in result.stderr

    def test_from_the_hub_says_how_to_compare_with_the_original(self, tmp_path, monkeypatch, capfd):
        downloaded = "florence_vl_hf.conversion.checkpoint_files.snapshot_download"
        monkeypatch.setattr(downloaded, lambda *_, **__: str(LLAMA / "checkpoint"))
        output, arguments = tmp_path / "out", ["--vision-tower", LLAMA / "vision_tower"]
        assert status("convert", "jiuhai/florence-vl-8b-sft", output, *arguments) == 0
        record, verify = capfd.readouterr().out.strip().split("\n")[-2:]
        assert f"python {RECORD_SCRIPT} --checkpoint jiuhai/florence-vl-8b-sft" in record
        file = record.split()[-1]
        assert verify.strip() == f"florence-vl verify {output} --reference {file}" and file.endswith(".safetensors")

    @pytest.mark.parametrize("source", ["last_frame", "spatial_avg_pool,last_frame"])
    def test_image_feature_source(self, source, tmp_path, capfd):
        arguments = ["--vision-tower", LLAMA / "vision_tower", "--image-feature-source", source]
        assert status("convert", LLAMA / "checkpoint", tmp_path / "out", *arguments) == 0
        assert f"{9 + source.count('spatial')} tokens" in capfd.readouterr().out

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["nowhere"], "neither a"),
            ([LLAMA / "checkpoint", "--chat-template", "chatml"], "choose one of llama3, phi3, plain, vicuna"),
            ([LLAMA / "checkpoint", "--image-feature-source", "mean"], "give at least one of"),
        ],
    )
    def test_error_is_one_line(self, arguments, message, tmp_path, capfd):
        source, *options = arguments
        assert status("convert", source, tmp_path / "out", *options) == 1
        error = capfd.readouterr().err.strip().split("\n")[-1]
        assert error.startswith("florence-vl: error: ") and message in error
        assert not (tmp_path / "out").exists()

    def test_wrong_use(self, tmp_path, capfd):
        assert status("convert", LLAMA / "checkpoint", tmp_path / "out", "--dtype", "int3") == 2
        assert "int3" in capfd.readouterr().err
