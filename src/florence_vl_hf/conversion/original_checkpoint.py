# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""An original checkpoint in this package's layout: checked from end to end, with weights that are read on demand."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import logging

from ..modeling import FlorenceVLConfig, FlorenceVLForConditionalGeneration
from ..processing import FlorenceVLProcessor, load_chat_template
from .checkpoint_files import (
    SETTINGS_FILES,
    CheckpointError,
    LazyTensor,
    read_json,
    read_tensors,
    resolve_checkpoint,
    write_tensors,
)
from .config_checks import check_config, check_layers, check_numbers, config_errors
from .key_mapping import ORIGINAL_TOWER, TIED_WORDS, MappedName, to_converted, to_original
from .original_adapters import apply_adapter, is_adapter
from .original_config import (
    PUBLIC_IMAGE_FEATURE_SOURCE,
    Assumption,
    TowerSettings,
    check_is_florence_vl,
    text_config_from_original,
    tower_settings_from_directory,
    tower_settings_from_tensors,
)
from .original_processor import add_image_token, detect_chat_template, load_original_tokenizer, read_processor


logger = logging.get_logger(__name__)

# Where an original checkpoint keeps its tower after pretraining, beside the shards.
TOWER_DIRECTORY = "vision_tower"
# Tensors with a row per token of the language model, to which `<image>` may add rows; the second may be tied.
LM_HEAD = "lm_head.weight"
EMBEDDING_TABLES = ("model.language_model.embed_tokens.weight", LM_HEAD)
# Generation flags that have no effect without `do_sample`.
SAMPLING_FLAGS = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


@dataclass
class ConvertedCheckpoint:
    """A model in this package's layout, with everything that is saved."""

    config: FlorenceVLConfig
    processor: FlorenceVLProcessor
    generation_config: GenerationConfig
    tensors: dict[str, LazyTensor] = field(default_factory=dict)  # by this package's names
    assumptions: list[Assumption] = field(default_factory=list)
    num_unused: int = 0  # tensors of the original that the model does not have
    chat_template: str | None = None  # one of `CHAT_TEMPLATES`; `None` for the one of a converted base
    num_added_rows: int = 0  # rows of zeros at the end of the embedding tables

    @property
    def num_parameters(self) -> int:
        return sum(torch.Size(tensor.shape).numel() for tensor in self.tensors.values())

    def save(self, directory: Path, max_shard_size: int | str = "1GB") -> None:
        """Write weights, configurations and processor into an existing directory."""
        write_tensors(directory, self.tensors, max_shard_size)
        self.config.save_pretrained(directory)
        self.generation_config.save_pretrained(directory)
        self.processor.save_pretrained(directory)
        # Configuration and processor copied their modules. No model is saved that would copy its own.
        custom_object_save(FlorenceVLForConditionalGeneration, directory)


def read_original(
    source: str | Path,
    *,
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    image_feature_source: list[str] | None = None,
    dtype: torch.dtype | None = None,
    chat_template: str | None = None,
    **hub_kwargs: Any,
) -> ConvertedCheckpoint:
    """
    Read an original checkpoint without its weights, and check that all of it can be converted.

    Arguments and errors are those of `convert`; `hub_kwargs` are arguments of `snapshot_download` for `source`.
    """
    source = resolve_checkpoint(source, **hub_kwargs)
    if base is not None and (not is_adapter(source) or read_tensors(source)):
        raise CheckpointError(f"{source} is not a projector or LoRA checkpoint; convert it without --base.")
    complete = source if base is None else resolve_checkpoint(base)
    stored = read_tensors(complete)
    if not stored and is_adapter(complete):
        raise CheckpointError(f"{complete} holds only an adapter; give its base model as --base.")
    if base is not None and read_json(complete / "config.json").get("model_type") == FlorenceVLConfig.model_type:
        config, processor = read_config(complete, stored), read_processor(complete)
        check_tensors(stored, tensor_shapes(config))
        checkpoint = ConvertedCheckpoint(config, processor, GenerationConfig.from_pretrained(complete))
        checkpoint.tensors = {name: tensor.to(dtype) for name, tensor in stored.items()}
        config.dtype = checkpoint.tensors[EMBEDDING_TABLES[0]].dtype
    else:
        tower = None if vision_tower is None else resolve_checkpoint(vision_tower, SETTINGS_FILES)
        checkpoint = _read_settings(complete, stored, tower, image_feature_source, chat_template)
        if not any(name.startswith(ORIGINAL_TOWER) for name in stored):
            stored |= read_tower_tensors(resolve_checkpoint(vision_tower or complete / TOWER_DIRECTORY))
        convert_tensors(checkpoint, stored, dtype)
    if base is not None:
        checkpoint.tensors = apply_adapter(checkpoint.tensors, source)
    return checkpoint


def read_settings(path_or_id: str | Path) -> ConvertedCheckpoint:
    """Read an original checkpoint except for its tensors: their shapes too if its tower has no configuration."""
    source = resolve_checkpoint(path_or_id, SETTINGS_FILES)
    if not Path(path_or_id).is_dir() and (source / TOWER_DIRECTORY / "config.json").is_file():
        return _read_settings(source)
    source = resolve_checkpoint(path_or_id)
    return _read_settings(source, read_tensors(source))


def _read_settings(
    source: Path,
    stored: dict[str, LazyTensor] | None = None,
    vision_tower: Path | None = None,
    image_feature_source: list[str] | None = None,
    chat_template: str | None = None,
) -> ConvertedCheckpoint:
    original, tower_directory = read_json(source / "config.json"), source / TOWER_DIRECTORY
    has_tower_config = (tower_directory / "config.json").is_file()
    has_davit = any(name.startswith(f"{ORIGINAL_TOWER}vision_tower.blocks.") for name in stored or {})
    check_is_florence_vl(original, has_davit or has_tower_config, source)
    if stored is not None and not stored:
        raise CheckpointError(f"{source} holds no weights; download its model-*.safetensors or pytorch_model-*.bin.")
    num_tensors = math.inf if stored is None else len(stored)
    check_layers(original, num_tensors, source / "config.json")
    if vision_tower is not None or has_tower_config:
        tower = tower_settings_from_directory(vision_tower or tower_directory, num_tensors)
    else:
        tower = tower_settings_from_tensors(stored or {})
    with config_errors(source):
        text_config = text_config_from_original(original)
    tokenizer = load_original_tokenizer(source)
    return build_settings(
        source,
        tower,
        text_config,
        tokenizer,
        chat_template or detect_chat_template(original["model_type"], tokenizer),
        image_feature_source,
        do_pad=original.get("image_aspect_ratio") == "pad",  # after finetuning only
        projector_depth=int(original["mm_projector_type"].removeprefix("mlp").removesuffix("x_gelu")),
    )


def build_settings(
    directory: Path,
    tower: TowerSettings,
    text_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str,
    image_feature_source: list[str] | None,
    do_pad: bool,
    **settings: Any,
) -> ConvertedCheckpoint:
    """Combine a vision tower and a language model, whose directory is given and whose tokenizer gets `<image>`."""
    num_original_rows, assumptions = text_config.vocab_size, tower.assumptions
    image_token_id, text_config.vocab_size = add_image_token(tokenizer, num_original_rows)
    image_feature_source = image_feature_source or tower.image_feature_source
    if image_feature_source is None:
        image_feature_source = list(PUBLIC_IMAGE_FEATURE_SOURCE)
        assumptions = [*assumptions, Assumption.IMAGE_FEATURE_SOURCE]
    with config_errors(directory):
        config = FlorenceVLConfig(
            vision_config=tower.config,
            text_config=text_config,
            image_token_id=image_token_id,
            image_size=tower.images["size"]["height"],
            image_feature_source=image_feature_source,
            architectures=[FlorenceVLForConditionalGeneration.__name__],
            **settings,
        )
    check_config(config, directory)
    if not (directory / "tokenizer_config.json").is_file():
        assumptions = [*assumptions, Assumption.TOKENIZER]
    for assumption in assumptions:
        logger.warning(assumption)
    template = load_chat_template(chat_template, tokenizer)
    return ConvertedCheckpoint(
        config,
        FlorenceVLProcessor(tower.image_processor(do_pad), tokenizer, config.num_image_tokens, template),
        read_generation_config(directory, config, num_original_rows),
        assumptions=assumptions,
        chat_template=chat_template,
        num_added_rows=text_config.vocab_size - num_original_rows,
    )


def read_tower_tensors(directory: Path) -> dict[str, LazyTensor]:
    """List the tensors of a Florence-2, of its first release or of Transformers, by their names in an original."""
    # Older versions of Transformers, and the base model alone, do not save the prefix.
    return {ORIGINAL_TOWER + name.removeprefix("model."): tensor for name, tensor in read_tensors(directory).items()}


def convert_names(stored: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Return the tensors of an original, given by name, by this package's names, without those it does not use."""
    converted = {}
    # A tied tensor may be stored under several names: the one that the key table lists first is used.
    for name in (*stored, *(ORIGINAL_TOWER + name for name in reversed(TIED_WORDS))):
        mapped = to_converted(name) or MappedName(f"unknown {name}", transposed=False)
        if name in stored and mapped.name is not None:
            converted[mapped.name] = stored[name].transposed() if mapped.transposed else stored[name]
    return converted


def convert_tensors(checkpoint: ConvertedCheckpoint, stored: dict[str, LazyTensor], dtype: torch.dtype | None) -> None:
    """Add the tensors of an original, given by name, to a checkpoint in the model's order, cast to `dtype`."""
    shapes, converted = tensor_shapes(checkpoint.config), convert_names(stored)
    stored_shapes = {
        name: (shape[0] - checkpoint.num_added_rows, *shape[1:]) if name in EMBEDDING_TABLES else shape
        for name, shape in shapes.items()
    }
    check_tensors(converted, stored_shapes, name_of=lambda name: str(to_original(name)[0].name))
    # Rows for `<image>` and up to the next multiple of 64 are zero, so that they are the same on every machine.
    checkpoint.tensors = {name: converted[name].with_rows(shape[0]).to(dtype) for name, shape in shapes.items()}
    checkpoint.config.dtype = checkpoint.tensors[EMBEDDING_TABLES[0]].dtype
    checkpoint.num_unused = len(stored) - len(shapes)


def read_config(directory: Path, stored: dict[str, LazyTensor]) -> FlorenceVLConfig:
    """Read the configuration of a model in this package's layout, whose tensors are given."""
    raw = read_json(directory / "config.json")
    if raw.get("model_type") != FlorenceVLConfig.model_type:
        expected = f"has model type {raw.get('model_type')!r}, expected {FlorenceVLConfig.model_type!r}"
        raise CheckpointError(f"{directory} {expected}; convert it first.")
    if not stored:
        raise CheckpointError(f"{directory} has no complete model.safetensors; save the model with `save_pretrained`.")
    check_layers(raw, len(stored), directory / "config.json")
    with config_errors(directory):
        config = FlorenceVLConfig.from_pretrained(directory)
    check_config(config, directory)
    return config


def check_sizes(directory: Path, allow_mismatch: bool) -> None:
    """Refuse a model in this package's layout whose tensors are not of the sizes in its configuration."""
    stored = read_tensors(directory)
    if not stored:
        return  # Transformers may know other names of files, or says what is missing.
    config = read_config(directory, stored)
    # Quantized weights have other shapes.
    if not allow_mismatch and getattr(config, "quantization_config", None) is None:
        shapes = {name: shape for name, shape in tensor_shapes(config).items() if name in stored}
        check_tensors({name: stored[name] for name in shapes}, shapes)


def tensor_shapes(config: FlorenceVLConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors of a model that are stored, by name."""
    with config_errors("the model"), torch.device("meta"):
        model = FlorenceVLForConditionalGeneration(config)
    tied = {LM_HEAD} if config.tie_word_embeddings else set()
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def check_tensors(
    tensors: dict[str, LazyTensor],
    shapes: dict[str, tuple[int, ...]],
    remedy: str = "download all of its files again",
    name_of: Callable[[str], str] = str,
) -> None:
    """Refuse tensors that do not have exactly these names and shapes. A head that is tied may be stored."""
    unused = [str(tensor) for name, tensor in tensors.items() if name not in shapes and name != LM_HEAD]
    missing = [name_of(name) for name in shapes if name not in tensors]
    problems = {"that nothing uses": unused, "that are missing": missing}
    if found := [f"{len(names)} {problem}: {', '.join(names[:5])}" for problem, names in problems.items() if names]:
        raise CheckpointError(
            f"The checkpoint does not match its configuration: there are tensors, {'; '.join(found)}. If all files "
            f"are complete, this kind of checkpoint is not supported; else {remedy}."
        )
    for name, shape in shapes.items():
        if not tensors[name].dtype.is_floating_point:
            raise CheckpointError(f"{tensors[name]} has dtype {tensors[name].dtype}, expected floating-point numbers.")
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"{tensors[name]} has shape {tensors[name].shape}, expected {shape} from the configuration; {remedy}."
            )


def read_generation_config(source: Path, config: FlorenceVLConfig, num_original_rows: int) -> GenerationConfig:
    """Return the generation settings of a checkpoint, for a model with added rows in its embedding tables."""
    path = source / "generation_config.json"
    settings: dict[str, Any] = read_json(path) if path.is_file() else {}
    # Older versions of Transformers save flags that have no effect, newer ones refuse to.
    ignored = () if settings.get("do_sample") else SAMPLING_FLAGS
    settings = {k: v for k, v in settings.items() if v is not None and k not in ignored and not k.startswith("_")}
    tokens = {name: getattr(config.text_config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    tokens |= {name: settings[name] for name in tokens if name in settings}
    check_numbers(tokens, config.text_config.vocab_size, path)
    # Rows that were added to reach a multiple of 64 are no tokens. The model itself suppresses `<image>`.
    suppressed = list(range(num_original_rows, config.text_config.vocab_size)) or None
    with config_errors(path):
        return GenerationConfig(**settings | tokens | {"suppress_tokens": suppressed})
