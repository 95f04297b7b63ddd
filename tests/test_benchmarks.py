# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Each part of `make bench` with tiny models. Timings are not checked."""

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from benchmarks.measuring import compare, own_seconds, peak_memory, record_products
from benchmarks.models import Setup
from benchmarks.plot import COLORS, plot


ROOT = Path(__file__).parents[1]
ORIGINAL, PEER, LIMIT = "original", "peer", "limit"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "baselines"),
    [
        ("processor", {ORIGINAL, PEER, "peer, same size", LIMIT}),
        ("vision", {ORIGINAL, PEER, LIMIT, "eager"}),
        ("loading", {ORIGINAL, PEER, LIMIT}),
        ("conversion", {LIMIT}),
        ("first_token", {ORIGINAL, PEER, LIMIT}),
        ("decoding", {ORIGINAL, PEER, LIMIT, "bandwidth", "dynamic"}),
        ("requests", {"one by one"}),
        ("second_turn", {ORIGINAL, PEER}),
        ("training", {ORIGINAL, PEER}),
        ("growth", {ORIGINAL, PEER, LIMIT}),
    ],
)
def test_part(part, baselines, tmp_path):
    # The command itself checks that ours equals the original's way.
    file = tmp_path / "rows.json"
    options = ["--small", "--repeats", "1", "--max-batch", "2", "--threads", "1", "--json", str(file)]
    command = [sys.executable, "-m", "benchmarks", part, *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads(file.read_text())["rows"]
    assert {row["baseline"] for row in rows} == baselines
    assert all(row["ours"] > 0 and row["theirs"] > 0 for row in rows)


@pytest.fixture
def setup() -> Setup:
    return Setup("tiny", True, 1, torch.device("cpu"), torch.float32, 2)


class TestOriginal:
    @torch.no_grad()
    def test_equals_ours(self, setup):
        pixel_values = setup.pixel_values(2)
        ours = torch.stack(setup.model.get_image_features(pixel_values, return_dict=True).pooler_output)
        setup.check_equal(ours, setup.original.image_features(pixel_values))

    @torch.no_grad()
    def test_another_prompt_differs(self, setup, monkeypatch):
        pixel_values = setup.pixel_values(1)
        ours = torch.stack(setup.model.get_image_features(pixel_values, return_dict=True).pooler_output)
        monkeypatch.setattr(setup.original, "prompts", setup.original.prompts[::-1])
        with pytest.raises(AssertionError):
            setup.check_equal(ours, setup.original.image_features(pixel_values))


class TestMeasuring:
    def test_works_alternate(self):
        order = []

        def work(name, seconds):
            times = iter(seconds)
            return lambda: (order.append(name), next(times))[1]

        # The first second of each is the warm-up.
        baselines = {"slow": work("slow", [9, 4, 6, 20])}
        (row,) = compare("name", work("ours", [9, 1, 2, 4]), baselines, 3, "items/s", 8, own_seconds)
        assert order == ["ours", "slow"] * 4
        assert (row.ours, row.theirs) == (8 / 2, 8 / 6)
        assert (row.ratio, row.spread) == (4, (3, 5))

    def test_different_output_raises(self):
        def check(ours, original):
            assert ours == original

        with pytest.raises(AssertionError):
            next(compare("name", lambda: 1, {"original": lambda: 2}, 1, check_original=check))

    def test_peak_memory(self):
        def work():
            for _ in range(3):
                torch.empty(2**20, dtype=torch.uint8)
            return "output"

        assert peak_memory(work) == ("output", 2**20)

    def test_products(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 2, stride=2), nn.Flatten(2), nn.Linear(9, 5))
        products = record_products(model, lambda: model(torch.randn(2, 3, 6, 6)))
        assert products.flops == 2 * (2 * 4 * 9) * (3 * 2 * 2) + 2 * (2 * 4) * 9 * 5
        products.replay()()

    def test_products_of_attention(self):
        query, key = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 5, 8)
        products = record_products(nn.Identity(), lambda: nn.functional.scaled_dot_product_attention(query, key, key))
        assert products.flops == 2 * 2 * (2 * 4) * 6 * 5 * 8
        products.replay()()


def test_picture_of_the_published_results(tmp_path):
    results, published = ROOT / "benchmarks" / "results" / "cpu-float32.json", ROOT / "docs" / "benchmarks.svg"
    plot(results, tmp_path / "picture.svg")
    names = {row["name"] for row in json.loads(results.read_text())["rows"] if row["baseline"] in COLORS}
    for picture in (tmp_path / "picture.svg", published):
        texts = {element.text for element in ElementTree.parse(picture).iter("{http://www.w3.org/2000/svg}text")}
        assert names <= texts
