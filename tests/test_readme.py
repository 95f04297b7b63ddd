# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""What the README shows is run, on a tiny model in place of the 8B."""

import ast
import copy
import re
from pathlib import Path

import torch

import florence_vl_hf
from florence_vl_hf.training.stages import part_of


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_use_and_features(converted, golden, capsys):
    use, features, *_ = BLOCKS
    code = use.replace("florence-vl-8b-sft-hf", str(converted)).replace(
        "street.jpg", str(golden.image_path("odd.jpg"))
    )
    names: dict = {}
    exec(code, names)
    assert capsys.readouterr().out.strip()
    assert isinstance(names["model"], florence_vl_hf.FlorenceVLForConditionalGeneration)
    exec(features, names)
    seen = names["seen"]
    assert list(seen.features) == ["image", "caption", "ocr", "grounding"]
    assert seen.pooler_output[0].shape == (names["model"].config.num_image_tokens, 64)


def test_ablations():
    names = {"FlorenceVLConfig": florence_vl_hf.FlorenceVLConfig}
    shown = [ast.unparse(statement) for statement in ast.parse(BLOCKS[2]).body if isinstance(statement, ast.Expr)]
    assert [eval(code, names).num_image_tokens for code in shown] == [3 * 577, 577, 576, 577]


def test_training(model, processor, data_file, golden, tmp_path):
    code = BLOCKS[3].replace("data/mine.json", str(data_file)).replace("data/images", str(golden.folder / "images"))
    names = {"model": copy.deepcopy(model), "processor": processor}
    exec(code.replace("runs/mine", str(tmp_path)), names)
    assert names["trainer"].state.global_step == 1
    before = dict(model.named_parameters())
    moved = {part_of(name) for name, p in names["model"].named_parameters() if not p.equal(before[name])}
    assert moved == {"projector", "language_model"}


def test_files_of_the_map_exist():
    for path in re.findall(
        r"`((?:modeling|processing|conversion|training|model_cards)/[\w./*]+|chat\.py|cli\.py)`", README
    ):
        assert list((ROOT / "src" / "florence_vl_hf").glob(path)), path


def test_default_configuration_is_the_example_that_is_shown():
    with torch.device("meta"):
        model = florence_vl_hf.FlorenceVLForConditionalGeneration(florence_vl_hf.FlorenceVLConfig())
    assert 8.4e9 < model.num_parameters() < 9.2e9
