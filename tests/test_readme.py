# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Run the examples of the README, with a tiny model instead of the 8B."""

import ast
import copy
import re
import shutil
from pathlib import Path

import torch

import florence_vl_hf
from florence_vl_hf.training.stages import part_of

from .conversion.test_assemble_florence_vl import native


__all__ = ["native"]

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TRAINING = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
ANALYSIS = (ROOT / "docs" / "analysis.md").read_text(encoding="utf-8")
BLOCKS, TRAINING_BLOCKS, ANALYSIS_BLOCKS = (
    re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) for text in (README, TRAINING, ANALYSIS)
)


def test_use_and_features(converted, golden, capsys):
    use, _, features, *_ = BLOCKS
    code = use.replace("florence-vl-8b-sft-hf", str(converted)).replace(
        "street.jpg", str(golden.image_path("odd.jpg"))
    )
    names: dict = {}
    exec(code, names)
    assert capsys.readouterr().out.strip()
    assert isinstance(names["model"], florence_vl_hf.FlorenceVLForConditionalGeneration)
    exec(features, names)
    outputs = names["outputs"]
    assert list(outputs.features) == ["image", "caption", "ocr", "grounding"]
    assert outputs.pooler_output[0].shape == (names["model"].config.num_image_tokens, 64)


def test_load_original(golden, tmp_path):
    original = shutil.copytree(golden.checkpoint, tmp_path / "original")
    if golden.vision_tower is not None:
        shutil.copytree(golden.vision_tower, original / "vision_tower")
    names: dict = {}
    exec(BLOCKS[1].replace("jiuhai/florence-vl-8b-sft", str(original)), names)
    assert isinstance(names["model"], florence_vl_hf.FlorenceVLForConditionalGeneration)
    assert isinstance(names["processor"], florence_vl_hf.FlorenceVLProcessor)


def test_ablations():
    names = {"FlorenceVLConfig": florence_vl_hf.FlorenceVLConfig}
    examples = [ast.unparse(statement) for statement in ast.parse(BLOCKS[3]).body if isinstance(statement, ast.Expr)]
    assert [eval(code, names).num_image_tokens for code in examples] == [3 * 577, 577, 576]


def test_training(model, processor, data_file, golden, tmp_path):
    code = (
        TRAINING_BLOCKS[0]
        .replace("data/mine.json", str(data_file))
        .replace("data/images", str(golden.folder / "images"))
    )
    names = {"model": copy.deepcopy(model), "processor": processor}
    exec(code.replace("runs/mine", str(tmp_path)), names)
    assert names["trainer"].state.global_step == 1
    before = dict(model.named_parameters())
    changed = {part_of(name) for name, p in names["model"].named_parameters() if not p.equal(before[name])}
    assert changed == {"projector", "language_model"}


def test_analysis(converted, native, golden, capsys):
    for block, model in zip(ANALYSIS_BLOCKS, (native, converted), strict=True):
        code = block.replace("microsoft/Florence-2-large", str(native)).replace("florence-vl-8b-sft-hf", str(model))
        names: dict = {}
        exec(re.sub(r"(street|sign)\.jpg", str(golden.image_path("odd.jpg")), code), names)
    assert names["answer"].weights.shape[1:] == (1, names["model"].config.num_feature_tokens)
    assert str(names["answer"].words) in capsys.readouterr().out


def test_files_of_the_table_exist():
    rooms = "modeling|analysis|processing|conversion|model_cards|training|evaluation|serving|../florence_vl_cli"
    paths = re.findall(rf"`((?:{rooms})/[\w./*]+)`", README)
    assert "../florence_vl_cli/*.py" in paths
    assert len(paths) > 15
    for path in paths:
        assert list((ROOT / "src" / "florence_vl_hf").glob(path)), path


def test_links_exist():
    for link in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / link).is_file(), link


def test_default_configuration_has_the_size_of_the_8b():
    with torch.device("meta"):
        model = florence_vl_hf.FlorenceVLForConditionalGeneration(florence_vl_hf.FlorenceVLConfig())
    assert 8.4e9 < model.num_parameters() < 9.2e9
