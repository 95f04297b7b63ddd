# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Data to train on: pictures and conversations in files, and settings of quick runs."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from ..conftest import Golden


@pytest.fixture(scope="session", autouse=True)
def _cache_of_datasets(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What `datasets` keeps of data that it read stays out of the user's home."""
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")


def llava_row(number: int, pictures: list[str], rounds: int = 1) -> dict[str, Any]:
    """A sample in LLaVA's form, with pictures in its first turn."""
    turns = []
    for i in range(rounds):
        marks = "<image>\n" * len(pictures) if i == 0 else ""
        turns.append({"from": "human", "value": f"{marks}What is {number + i}?"})
        turns.append({"from": "gpt", "value": f"It is {number + i}."})
    row: dict[str, Any] = {"id": f"sample-{number}", "conversations": turns}
    if pictures:
        row["image"] = pictures[0] if len(pictures) == 1 else pictures
    return row


@pytest.fixture
def picture_folder(tmp_path: Path) -> Path:
    """A folder with two pictures, one of them deeper: `a.png` of 8 x 6 pixels, `deep/ü b.jpg` of 5 x 7."""
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    Image.new("RGB", (8, 6), "red").save(folder / "a.png")
    Image.new("L", (5, 7)).save(folder / "deep" / "ü b.jpg")
    return folder


@pytest.fixture
def data_file(golden: Golden, tmp_path: Path) -> Path:
    """Eight samples: with one picture, with two, and without any, of one round and of two."""
    pictures = [golden.image_path(name).name for name in golden.reference["images"]]
    rows = [
        llava_row(number, pictures[number : number + (1, 1, 0, 2)[number % 4]], rounds=1 + number % 2)
        for number in range(8)
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.fixture
def recipe(golden: Golden, converted: Path, data_file: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings of a run of a few steps."""
    return {
        "model_name_or_path": str(converted),
        "train_file": str(data_file),
        "image_folder": str(golden.folder / "images"),
        "output_dir": str(tmp_path / "output"),
        "use_cpu": True,
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 1.0e-3,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
