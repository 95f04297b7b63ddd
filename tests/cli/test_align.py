# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import json

import pytest
from PIL import Image

from ..analysis.test_encoders import encoders, write_pairs
from ..conftest import status
from ..conversion.test_assemble_florence_vl import native
from ..evaluation.conftest import directory


__all__ = ["directory", "encoders", "native"]


@pytest.mark.slow
def test_writes_results(directory, encoders, tmp_path, capfd):
    write_pairs(tmp_path, 25)
    (tmp_path / "4.png").write_bytes(b"no image")
    command = ["align", tmp_path / "pairs.json", "--model", directory, "--encoder", encoders["clip"]]
    command += ["--encoder", encoders["dinov2"], "--output", tmp_path / "out", "--device", "cpu", "--batch-size", "5"]
    assert status(*command) == 0
    printed = capfd.readouterr()
    assert f"Wrote {tmp_path / 'out'}: 24 pairs, 1 images with an error.\n" in printed.out and "25/25" in printed.err
    result = json.loads((tmp_path / "out" / "alignment.json").read_text())
    assert len(result["results"]) == 17 and "4.png cannot be read" in result["errors"][0]["error"]
    table = (tmp_path / "out" / "alignment.md").read_text()
    assert table.count("\n") == 20 and f"| {encoders['clip']} | 16 |" in table
    assert Image.open(tmp_path / "out" / "curves.png").size > (900, 500)
    assert len(list((tmp_path / "out.cache").iterdir())) == 4
    assert status(*command) == 1 and "out exists already" in capfd.readouterr().err


def test_errors_are_one_line(directory, native, tmp_path, capfd):
    write_pairs(tmp_path, 22)
    write_pairs(tmp_path / "few", 19)
    (tmp_path / "empty.json").write_text("[]")
    for i in range(22):
        (tmp_path / f"{i}.txt").write_text(f"no image {i}")
    broken = [{"image": f"{i}.txt", "caption": "text"} for i in range(22)]
    (tmp_path / "broken.json").write_text(json.dumps(broken))
    (tmp_path / "captions.json").write_text(json.dumps([{"image": "0.png"}]))
    for file, options, message in (
        ("empty.json", [], "has no list of pairs"),
        ("captions.json", [], "Pair 1 of"),
        ("few/pairs.json", [], "Got 19 images to align, expected at least 20."),
        ("broken.json", [], f"Got 0 images to align, expected at least 20. The first error: {tmp_path / '0.txt'}"),
        ("pairs.json", ["--encoder", "nowhere"], "nowhere is neither a directory nor"),
        ("pairs.json", ["--llm", "nowhere"], "nowhere is neither a directory nor"),
        ("pairs.json", ["--model", native], "has no language model"),
        ("pairs.json", ["--model", "nowhere"], "nowhere is neither a directory nor"),
    ):
        output = ["--output", tmp_path / "out", "--device", "cpu"]
        assert status("align", tmp_path / file, "--model", directory, *output, *options) == 1
        [error] = [line for line in capfd.readouterr().err.split("\n") if line.startswith("florence-vl: ")]
        assert message in error
        assert not (tmp_path / "out").exists()
