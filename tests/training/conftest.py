# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Data to train on: images and conversations in files, and settings of quick runs."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ..conftest import Golden


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """A directory with two images: `a.png` of 8 x 6 pixels and `deep/ü b.jpg` of 5 x 7."""
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    Image.new("RGB", (8, 6), "red").save(folder / "a.png")
    Image.new("L", (5, 7)).save(folder / "deep" / "ü b.jpg")
    return folder


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
