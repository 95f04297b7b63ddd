# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""The code beside a saved model, with which it loads where this package is not installed."""

import inspect
import json
import shutil
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from ..modeling import FlorenceVLConfig, FlorenceVLForConditionalGeneration, FlorenceVLModel
from ..processing import FlorenceVLProcessor
from .checkpoint_files import read_json


# Written by hand, since `register_for_auto_class` keeps the last class only. Pipelines look for both heads.
AUTO_CLASSES = {
    "AutoConfig": FlorenceVLConfig,
    "AutoModel": FlorenceVLModel,
    "AutoModelForImageTextToText": FlorenceVLForConditionalGeneration,
    "AutoModelForMultimodalLM": FlorenceVLForConditionalGeneration,
    "AutoProcessor": FlorenceVLProcessor,
}
# Which of them each file names.
AUTO_MAPS = {"config.json": tuple(AUTO_CLASSES), "processor_config.json": ("AutoProcessor",)}


def auto_map(file_name: str) -> dict[str, str]:
    """What `trust_remote_code=True` reads in a file of `AUTO_MAPS`: the module and class for each Auto class."""
    return {
        name: f"{_module_file(AUTO_CLASSES[name]).stem}.{AUTO_CLASSES[name].__name__}" for name in AUTO_MAPS[file_name]
    }


def remote_modules() -> list[Path]:
    """The modules of the Auto classes and all that these import. Transformers wants them flat in one folder."""
    modules = {_module_file(auto_class) for auto_class in AUTO_CLASSES.values()}
    return sorted(modules | {Path(file) for module in modules for file in get_relative_import_files(module)})


def _module_file(auto_class: type) -> Path:
    return Path(inspect.getfile(auto_class))


def write_remote_code(folder: str | Path) -> None:
    """
    Put this package's modules beside a saved model, and tell its `config.json` and `processor_config.json` of them.

    Args:
        folder (`str` or `Path`): Where `save_pretrained` of model and processor wrote.
    """
    for module in remote_modules():
        shutil.copyfile(module, Path(folder) / module.name)
    for file_name in AUTO_MAPS:
        path = Path(folder) / file_name
        settings = read_json(path) | {"auto_map": auto_map(file_name)}
        path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


__all__ = ["AUTO_MAPS", "auto_map", "remote_modules", "write_remote_code"]
