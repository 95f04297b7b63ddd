# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""`from_pretrained` on an original checkpoint: configuration, weights and processor are translated while they load."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, conversion_mapping
from transformers.core_model_loading import ConversionOps, Transpose, WeightConverter, WeightRenaming
from transformers.utils import logging

from ..modeling import FlorenceVLConfig, FlorenceVLPreTrainedModel
from ..processing import FlorenceVLProcessor
from .convert_florence_vl_to_hf import CHECKPOINT_FILES, plan_conversion, resolve_folder
from .errors import CheckpointError
from .original_config import TEXT_MODEL_TYPES
from .original_model import TOWER_FOLDER, OriginalModel, read_original_model


logger = logging.get_logger(__name__)

# What tells an original checkpoint apart from its weights.
SMALL_FILES = ["*.json", "*.model", "*.txt"]
# Arguments of `from_pretrained` that say where and how to find a repository on the Hub.
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "force_download", "local_files_only")

# Transformers keeps conversions in a table of the process, to which one is added while a model loads.
_CONVERSIONS = RLock()


class PadRows(ConversionOps):
    """Add zero rows at the end, as many as the parameter has: the rows of `<image>` and up to a multiple of 64."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        model: PreTrainedModel | None = None,
        full_layer_name: str | None = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        tensors = next(iter(input_dict.values()))
        tensor = tensors[0] if isinstance(tensors, list) else tensors
        missing_rows = model.get_parameter_or_buffer(full_layer_name).shape[0] - tensor.shape[0]
        padding = tensor.new_zeros(missing_rows, *tensor.shape[1:])
        return {target_patterns[0]: torch.cat([tensor, padding])}


def is_original(name_or_path: Any, **kwargs: Any) -> bool:
    """Whether `from_pretrained` was given an original checkpoint, or some other with its model types."""
    if name_or_path is None:
        return False
    try:
        config, _ = PreTrainedConfig.get_config_dict(name_or_path, **_hub_arguments(kwargs))
    except OSError:
        return False  # Transformers will say what is wrong
    return config.get("model_type") in TEXT_MODEL_TYPES


def _hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}


def _read(name_or_path: str | Path, kwargs: dict[str, Any]) -> OriginalModel:
    """Translate all but the weights, which are fetched only if the tower's configuration is nowhere else."""
    folder = resolve_folder(name_or_path, SMALL_FILES, **_hub_arguments(kwargs))
    if not (folder / TOWER_FOLDER / "config.json").is_file():
        folder = resolve_folder(name_or_path, CHECKPOINT_FILES, **_hub_arguments(kwargs))
    model = read_original_model(folder)
    for assumed in model.tower.assumptions:
        logger.warning_once(assumed)
    return model


def load_config(name_or_path: str | Path, **kwargs: Any) -> FlorenceVLConfig:
    """The configuration of an original checkpoint, in this package's form."""
    return _read(name_or_path, kwargs).config


def load_processor(name_or_path: str | Path, **kwargs: Any) -> FlorenceVLProcessor:
    """The processor of an original checkpoint."""
    model = _read(name_or_path, kwargs)
    return model.build_processor(model.fitting_chat_template)


def load_model(
    load: Callable[..., PreTrainedModel], model_class: type[PreTrainedModel], name_or_path: str | Path, **kwargs: Any
) -> PreTrainedModel | tuple[PreTrainedModel, dict[str, Any]]:
    """
    Load the weights of an original checkpoint, renamed on their way.

    Args:
        load (`Callable`): Transformers' own `from_pretrained` of `model_class`.
        model_class (`type`): What is loaded.
        name_or_path (`str` or `Path`): The original checkpoint.
        kwargs: As for `from_pretrained`.

    Raises:
        CheckpointError: If anything is missing, unexpected, misshapen or damaged.
    """
    folder = resolve_folder(name_or_path, CHECKPOINT_FILES, **_hub_arguments(kwargs))
    plan = plan_conversion(folder)
    elsewhere = next((t.stored for t in plan.tensors.values() if t.stored.file.parent != folder), None)
    if elsewhere is not None:
        raise CheckpointError(
            f"{name_or_path} has not all of its weights in one place: {elsewhere} of {elsewhere.file.parent}. Convert "
            f"it with `florence-vl convert`, and load the result."
        )
    if kwargs.get("config") is None:
        kwargs["config"] = plan.config
    conversions, unused = [], list(plan.unused)
    prefix = "" if model_class.can_generate() else f"{model_class.base_model_prefix}."
    for name, planned in plan.tensors.items():
        if name.startswith(prefix):
            padded = planned.stored.shape != planned.shape and not planned.transposed
            conversions.append(_conversion(planned.stored.name, name.removeprefix(prefix), planned.transposed, padded))
        else:  # the base model has no head
            unused.append(planned.stored.name)
    with _registered(model_class, conversions, unused):
        loaded = load(folder, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    # Else `save_pretrained` would turn the names back into the original's.
    model._weight_conversions = None
    model.config.name_or_path = str(name_or_path)
    if model.can_generate():
        model.generation_config = plan.generation_config
    return loaded


def _conversion(original: str, converted: str, transposed: bool, padded: bool) -> WeightRenaming | WeightConverter:
    if transposed:
        return WeightConverter(original, converted, operations=[Transpose()])
    if padded:
        return WeightConverter(original, converted, operations=[PadRows()])
    return WeightRenaming(f"^{re.escape(original)}$", converted)


@contextmanager
def _registered(
    model_class: type[PreTrainedModel], conversions: list[WeightRenaming | WeightConverter], unused: list[str]
) -> Iterator[None]:
    # `key_mapping` of `from_pretrained` can only rename; what transposes must be registered for a class. Registered
    # for good, it would also turn names back when a model is saved that was never loaded from an original.
    name = model_class.__name__
    with _CONVERSIONS:
        before = model_class._keys_to_ignore_on_load_unexpected
        conversion_mapping.register_checkpoint_conversion_mapping(name, conversions, overwrite=True)
        model_class._keys_to_ignore_on_load_unexpected = [f"^{re.escape(name)}$" for name in unused]
        try:
            yield
        finally:
            model_class._keys_to_ignore_on_load_unexpected = before
            conversion_mapping._checkpoint_conversion_mapping_cache.pop(name)
            conversion_mapping.USER_REGISTERED_MAPPINGS.discard(name)


def register_original_checkpoints() -> None:
    """Teach the Auto classes and the package's own that original checkpoints can be loaded as they are."""
    FlorenceVLConfig.foreign_loader = (is_original, load_config)
    FlorenceVLPreTrainedModel.foreign_loader = (is_original, load_model)
    FlorenceVLProcessor.foreign_loader = (is_original, load_processor)
    for model_type in TEXT_MODEL_TYPES:
        AutoConfig.register(model_type, _config_class(model_type))


def _config_class(model_type: str) -> type[FlorenceVLConfig]:
    """`AutoConfig` wants a class for each model type; what it makes is a plain `FlorenceVLConfig`."""

    def from_dict(cls: type[FlorenceVLConfig], config_dict: dict[str, Any], **kwargs: Any) -> FlorenceVLConfig:
        config = load_config(kwargs.pop("name_or_path"), **kwargs)
        return FlorenceVLConfig.from_dict(config.to_dict(), **kwargs)

    members = {"model_type": model_type, "from_dict": classmethod(from_dict), "__module__": __name__}
    return type(f"FlorenceVLConfigOf{TEXT_MODEL_TYPES[model_type].title()}", (FlorenceVLConfig,), members)


__all__ = ["register_original_checkpoints"]
