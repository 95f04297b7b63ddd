# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Loading of models and processors from original checkpoints, or from those of this package."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.utils import find_adapter_config_file

from ..modeling import FlorenceVLConfig, FlorenceVLForConditionalGeneration
from ..processing import FlorenceVLProcessor, load_chat_template
from .checkpoint_files import CheckpointError, is_directory, read_json
from .config_checks import own_fields
from .original_adapters import check_patterns
from .original_checkpoint import check_sizes, read_original, read_settings
from .original_config import TEXT_MODEL_TYPES
from .original_processor import read_processor


# Arguments of `from_pretrained` that concern the download from the Hub.
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "force_download", "local_files_only")


def is_original(path_or_id: str | Path, **hub_kwargs: Any) -> bool:
    """
    Whether the `config.json` of a directory or Hub repository has the model type of an original checkpoint.

    Raises:
        CheckpointError: If it is a path and there is no such directory, or one of its files is damaged.
    """
    is_directory(path_or_id)
    try:
        return _model_type(path_or_id, **hub_kwargs) in TEXT_MODEL_TYPES
    except (OSError, ValueError):
        return False  # What loads the checkpoint says what is wrong with it.


def check_model_type(path_or_id: str | Path, **hub_kwargs: Any) -> None:
    """Raise a `CheckpointError` if a directory or Hub repository has no Florence-VL, in either layout."""
    is_directory(path_or_id)
    _require_florence_vl(path_or_id, **hub_kwargs)


def _require_florence_vl(path_or_id: str | Path, **hub_kwargs: Any) -> None:
    model_type = _model_type(path_or_id, **hub_kwargs)
    if model_type not in (FlorenceVLConfig.model_type, *TEXT_MODEL_TYPES):
        raise CheckpointError(
            f"{path_or_id} has model type {model_type!r}, expected {FlorenceVLConfig.model_type!r}; "
            f"`florence-vl assemble` builds a Florence-VL from a Florence-2 and a language model."
        )


def _model_type(path_or_id: str | Path, **hub_kwargs: Any) -> str:
    if Path(path_or_id).is_dir():
        return str(read_json(Path(path_or_id) / "config.json").get("model_type"))
    return str(PreTrainedConfig.get_config_dict(path_or_id, **hub_kwargs)[0].get("model_type"))


def load_processor(path_or_id: str | Path) -> FlorenceVLProcessor:
    """Load the processor of a model in either layout. Of an original, weights are read only if necessary."""
    if is_original(path_or_id):
        return read_settings(path_or_id).processor
    return read_processor(path_or_id)


def load_original(
    path_or_id: str | Path,
    *,
    vision_tower: str | Path | None = None,
    image_feature_source: list[str] | None = None,
    chat_template: str | None = None,
    base: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    device_map: Any = None,
    **kwargs: Any,
) -> tuple[Any, FlorenceVLProcessor]:
    """
    Load an original checkpoint, with the same result as if it was converted first.

    Args:
        path_or_id (`str` or `Path`): Directory or Hub id of the original checkpoint.
        vision_tower (`str` or `Path`, *optional*): As in `convert`, as are the next three.
        image_feature_source (`list[str]`, *optional*): How the vision tower turns an image into tokens.
        chat_template (`str`, *optional*): `llama3`, `phi3`, `vicuna` or `plain`.
        base (`str` or `Path`, *optional*): Base model of an adapter.
        dtype (`torch.dtype` or `str`, *optional*): As in `from_pretrained`, as are the next two.
        attn_implementation (`str`, *optional*): Attention of the whole model.
        device_map (`str` or `dict`, *optional*): Devices of the parts.
        kwargs (`Any`): Other arguments of `from_pretrained`, and fields of `FlorenceVLConfig` that override the
            checkpoint's.

    Returns:
        `tuple`: What `FlorenceVLForConditionalGeneration.from_pretrained` returns, and the processor.

    Raises:
        CheckpointError: If anything is missing, unexpected, misshapen or damaged.
    """
    checkpoint = read_original(
        path_or_id,
        base=base,
        vision_tower=vision_tower,
        image_feature_source=image_feature_source,
        chat_template=chat_template,
        **{name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs},
    )
    kwargs |= {"dtype": dtype, "attn_implementation": attn_implementation, "device_map": device_map}
    config = kwargs.pop("config", None) or _with_overrides(checkpoint.config, kwargs)
    # Views of the mapped files, which are read one by one while the model takes them over.
    state_dict = {name: tensor.load().contiguous() for name, tensor in checkpoint.tensors.items()}
    loaded = FlorenceVLForConditionalGeneration.from_pretrained(None, config=config, state_dict=state_dict, **kwargs)
    model = _model_of(loaded)
    model.generation_config = checkpoint.generation_config
    # PEFT reads the model's attribute, others the configuration's.
    model.name_or_path = model.config.name_or_path = str(path_or_id)
    checkpoint.processor.num_image_tokens = model.config.num_image_tokens
    return loaded, checkpoint.processor


def load_pretrained(
    path_or_id: str | Path,
    *,
    vision_tower: str | Path | None = None,
    image_feature_source: list[str] | None = None,
    chat_template: str | None = None,
    **kwargs: Any,
) -> tuple[Any, FlorenceVLProcessor]:
    """
    Load a model and its processor from an original checkpoint, from one in this package's layout, or from an adapter
    that PEFT saved for either.

    Arguments and return values are those of `load_original`.
    """
    of_original: dict[str, Any] = {"vision_tower": vision_tower, "image_feature_source": image_feature_source}
    hub_kwargs = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
    if is_original(path_or_id, **hub_kwargs):
        return load_original(path_or_id, chat_template=chat_template, **of_original, **kwargs)
    adapter_config = find_adapter_config_file(str(path_or_id), **hub_kwargs)
    adapter = read_json(Path(adapter_config)) if adapter_config else {}
    check_patterns(adapter)
    base = adapter.get("base_model_name_or_path")
    if base and is_original(base):
        loaded, _ = load_original(base, **of_original, **kwargs)
        _model_of(loaded).load_adapter(str(path_or_id))
    else:
        if not base:
            # `is_original` has read the files already.
            _require_florence_vl(path_or_id, **hub_kwargs)
            if Path(path_or_id).is_dir():
                check_sizes(Path(path_or_id), allow_mismatch=kwargs.get("ignore_mismatched_sizes", False))
        if vision_tower is not None:
            raise CheckpointError(f"{path_or_id} is not an original checkpoint and has a vision tower; omit this one.")
        kwargs |= {} if image_feature_source is None else {"image_feature_source": image_feature_source}
        if kwargs.keys() & set(own_fields(FlorenceVLConfig)):
            config = FlorenceVLConfig.from_pretrained(path_or_id, **hub_kwargs)
            kwargs["config"] = _with_overrides(config, kwargs)
        loaded = FlorenceVLForConditionalGeneration.from_pretrained(path_or_id, **kwargs)
    processor = read_processor(path_or_id, **hub_kwargs)
    processor.num_image_tokens = _model_of(loaded).config.num_image_tokens
    if chat_template is not None:
        processor.chat_template = load_chat_template(chat_template, processor.tokenizer, processor.image_token)
    return loaded, processor


def _model_of(loaded: Any) -> FlorenceVLForConditionalGeneration:
    """`from_pretrained` returns a pair with `output_loading_info=True`."""
    return loaded[0] if isinstance(loaded, tuple) else loaded


def _with_overrides(config: FlorenceVLConfig, kwargs: dict[str, Any]) -> FlorenceVLConfig:
    """Move the fields of a configuration from `kwargs` into it."""
    overrides = {name: kwargs.pop(name) for name in own_fields(FlorenceVLConfig) if name in kwargs}
    # Built anew, since fields are checked and derived from each other.
    return FlorenceVLConfig.from_dict(config.to_dict() | overrides) if overrides else config
