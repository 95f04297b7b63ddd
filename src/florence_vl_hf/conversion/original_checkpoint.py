# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""An original checkpoint in this package's layout: checked from end to end, with weights that are read on demand."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save

from ..modeling import FlorenceVLConfig, FlorenceVLForConditionalGeneration
from ..processing import FlorenceVLProcessor
from .checkpoint_files import CheckpointError, LazyTensor, read_json, read_tensors, resolve_checkpoint, write_tensors
from .key_mapping import ORIGINAL_TOWER, to_converted, to_first_release, to_original
from .original_adapters import apply_adapter, is_adapter
from .original_config import (
    Assumption,
    TowerSettings,
    check_is_florence_vl,
    text_config_from_original,
    tower_settings_from_directory,
    tower_settings_from_tensors,
)
from .original_processor import add_image_token, build_processor, detect_chat_template, load_original_tokenizer


# Where an original checkpoint keeps its tower after pretraining, beside the shards.
TOWER_DIRECTORY = "vision_tower"
# Files of a Florence-2 that are downloaded where the checkpoint has the weights.
TOWER_CONFIG_FILES = ("config.json", "preprocessor_config.json", "processor_config.json")
# Tensors with a row per token of the language model, to which `<image>` may add rows.
EMBEDDING_TABLES = ("model.language_model.embed_tokens.weight", "lm_head.weight")
# Generation flags that have no effect without `do_sample`.
SAMPLING_FLAGS = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


@dataclass
class ConvertedCheckpoint:
    """A model in this package's layout, with everything that is saved."""

    config: FlorenceVLConfig
    processor: FlorenceVLProcessor
    generation_config: GenerationConfig
    tensors: dict[str, LazyTensor]  # by this package's names
    assumptions: list[Assumption] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)  # names of stored tensors
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
    tower = None if vision_tower is None else resolve_checkpoint(vision_tower, TOWER_CONFIG_FILES)
    if base is not None and read_json(complete / "config.json").get("model_type") == FlorenceVLConfig.model_type:
        checkpoint = _read_converted(complete, dtype)
    else:
        checkpoint = _read_complete(complete, tower, image_feature_source, dtype, chat_template)
    if base is not None:
        checkpoint.tensors = apply_adapter(checkpoint.tensors, source)
    return checkpoint


def _read_complete(
    source: Path,
    vision_tower: Path | None,
    image_feature_source: list[str] | None,
    dtype: torch.dtype | None,
    chat_template: str | None,
) -> ConvertedCheckpoint:
    """Read an original checkpoint that is no adapter."""
    stored = read_tensors(source)
    if not stored and is_adapter(source):
        raise CheckpointError(f"{source} holds only an adapter; give its base model as --base.")
    original = read_json(source / "config.json")
    tower_tensors = {
        name.removeprefix(ORIGINAL_TOWER): tensor for name, tensor in stored.items() if name.startswith(ORIGINAL_TOWER)
    }
    has_davit = any(name.startswith("vision_tower.blocks.") for name in tower_tensors)
    check_is_florence_vl(original, has_davit, source)
    if not stored:
        raise CheckpointError(f"{source} holds no weights; download its model-*.safetensors or pytorch_model-*.bin.")
    if vision_tower is None and (source / TOWER_DIRECTORY / "config.json").is_file():
        vision_tower = source / TOWER_DIRECTORY
    if vision_tower is None:
        tower = tower_settings_from_tensors(tower_tensors, image_feature_source)
    else:
        tower = tower_settings_from_directory(vision_tower, image_feature_source)
        if not tower_tensors:
            stored |= {ORIGINAL_TOWER + name: tensor for name, tensor in read_tower_tensors(vision_tower).items()}

    tokenizer = load_original_tokenizer(source)
    chat_template = chat_template or detect_chat_template(original["model_type"], tokenizer)
    text_config = text_config_from_original(original)
    num_original_rows = text_config.vocab_size
    projector_depth = int(original["mm_projector_type"].removeprefix("mlp").removesuffix("x_gelu"))
    try:
        config = build_config(tower, text_config, tokenizer, projector_depth=projector_depth)
    except ValueError as error:
        raise CheckpointError(f"The configuration of {source} contradicts itself: {error}") from error
    do_pad = original.get("image_aspect_ratio") == "pad"  # after finetuning only
    processor = build_processor(tower, tokenizer, config.num_image_tokens, do_pad, chat_template)
    checkpoint = build_checkpoint(source, config, processor, stored, num_original_rows, dtype)
    checkpoint.assumptions, checkpoint.chat_template = tower.assumptions, chat_template
    return checkpoint


def build_config(
    tower: TowerSettings, text_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, **settings: Any
) -> FlorenceVLConfig:
    """Build the configuration of a vision tower and a language model, whose tokenizer gets the image token."""
    image_token_id, text_config.vocab_size = add_image_token(tokenizer, text_config.vocab_size)
    return FlorenceVLConfig(
        vision_config=tower.config,
        text_config=text_config,
        image_token_id=image_token_id,
        image_size=tower.image_size,
        image_feature_source=tower.image_feature_source,
        architectures=[FlorenceVLForConditionalGeneration.__name__],
        **settings,
    )


def build_checkpoint(
    directory: Path,
    config: FlorenceVLConfig,
    processor: FlorenceVLProcessor,
    stored: dict[str, LazyTensor],
    num_original_rows: int,
    dtype: torch.dtype | None,
) -> ConvertedCheckpoint:
    """Build a model from tensors by the original's names. `directory` is that of the language model."""
    tensors, unused = convert_tensors(config, stored, num_original_rows, dtype)
    config.dtype = tensors[EMBEDDING_TABLES[0]].dtype
    return ConvertedCheckpoint(
        config=config,
        processor=processor,
        generation_config=read_generation_config(directory, config, num_original_rows),
        tensors=tensors,
        unused=unused,
        num_added_rows=config.text_config.vocab_size - num_original_rows,
    )


def _read_converted(directory: Path, dtype: torch.dtype | None) -> ConvertedCheckpoint:
    """Read a model in this package's layout, as the base of an adapter."""
    config = FlorenceVLConfig.from_pretrained(directory)
    tensors, shapes = read_tensors(directory), tensor_shapes(config)
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    if {name: tensor.shape for name, tensor in tensors.items()} != shapes:
        raise CheckpointError(f"The weights in {directory} do not match its config.json; save the model again.")
    if dtype is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    config.dtype = tensors[EMBEDDING_TABLES[0]].dtype
    processor = FlorenceVLProcessor.from_pretrained(directory)
    return ConvertedCheckpoint(config, processor, GenerationConfig.from_pretrained(directory), tensors)


def read_tower_tensors(directory: Path) -> dict[str, LazyTensor]:
    """List the tensors of a Florence-2 by their names in its first release, whichever layout it has."""
    tensors = {}
    for name, tensor in read_tensors(directory).items():
        mapped = to_first_release(name)
        if mapped is None:  # it is of the first release
            tensors[name] = tensor
        elif mapped.name is not None:
            tensors[mapped.name] = tensor.transposed() if mapped.transposed else tensor
    return tensors


def convert_tensors(
    config: FlorenceVLConfig, stored: dict[str, LazyTensor], num_original_rows: int, dtype: torch.dtype | None = None
) -> tuple[dict[str, LazyTensor], list[str]]:
    """
    Map the tensors of an original checkpoint, with `num_original_rows` rows in its embedding tables, to the model's.

    Returns the model's tensors in its order, cast to `dtype` if one is given, and the names of unused originals.
    """
    shapes = tensor_shapes(config)
    mapped = {name: to_converted(name) for name in stored}
    unknown = [str(stored[name]) for name, to in mapped.items() if to is None or to.name not in (None, *shapes)]
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    tensors, used, missing = {}, set(), []
    for name, shape in shapes.items():
        # A tied tensor may be stored under several names: the one that the key table lists first is used.
        names = to_original(name)
        original = next((original for original in names if original.name in stored), None)
        if original is None:
            missing.append(str(names[0].name))
            continue
        tensor = stored[str(original.name)]
        expected = (num_original_rows, *shape[1:]) if name in EMBEDDING_TABLES else shape
        expected = expected[::-1] if original.transposed else expected
        if tensor.shape != expected:
            raise CheckpointError(f"{tensor} has shape {tensor.shape}, expected {expected} from the configuration.")
        tensor = tensor.transposed() if original.transposed else tensor
        # Rows for `<image>` and up to the next multiple of 64 are zero, so that they are the same on every machine.
        tensor = tensor.with_rows(shape[0]) if name in EMBEDDING_TABLES else tensor
        tensors[name] = tensor if dtype is None else tensor.to(dtype)
        used.add(original.name)
    check_all_paired(unknown, missing)
    return tensors, sorted(set(stored) - used)


def tensor_shapes(config: FlorenceVLConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors of a model by name, tied ones included."""
    with torch.device("meta"):
        model = FlorenceVLForConditionalGeneration(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def check_all_paired(unknown: list[str], missing: list[str]) -> None:
    """Refuse a checkpoint with unknown or missing tensors, and name them."""
    problems = {"that nothing uses": unknown, "that are missing": missing}
    if found := [f"{len(names)} {problem}: {', '.join(names[:5])}" for problem, names in problems.items() if names]:
        raise CheckpointError(
            f"The checkpoint does not match its configuration: there are tensors, {'; '.join(found)}. Download all of "
            f"its files again; if they are complete, this kind of checkpoint is not supported."
        )


def read_generation_config(source: Path, config: FlorenceVLConfig, num_original_rows: int) -> GenerationConfig:
    """Return the generation settings of a checkpoint, for a model with added rows in its embedding tables."""
    path = source / "generation_config.json"
    settings: dict[str, Any] = read_json(path) if path.is_file() else {}
    # Older versions of Transformers save flags that have no effect, newer ones refuse to.
    ignored = () if settings.get("do_sample") else SAMPLING_FLAGS
    settings = {k: v for k, v in settings.items() if v is not None and k not in ignored and not k.startswith("_")}
    tokens = {name: getattr(config.text_config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    # Rows that were added to reach a multiple of 64 are no tokens. The model itself suppresses `<image>`.
    suppressed = list(range(num_original_rows, config.text_config.vocab_size)) or None
    return GenerationConfig(**tokens | settings | {"suppress_tokens": suppressed})
