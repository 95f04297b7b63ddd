# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""An original checkpoint in this package's layout: checked from end to end, with weights that are read on demand."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import logging

from ..modeling import FlorenceVLConfig, FlorenceVLForConditionalGeneration
from ..processing import FlorenceVLProcessor
from .checkpoint_files import (
    SETTINGS_FILES,
    CheckpointError,
    LazyTensor,
    read_json,
    read_tensors,
    resolve_checkpoint,
    write_tensors,
)
from .key_mapping import ORIGINAL_TOWER, TIED_WORDS, to_converted, to_original
from .original_adapters import apply_adapter, is_adapter
from .original_config import (
    TowerSettings,
    check_is_florence_vl,
    text_config_from_original,
    tower_settings_from_directory,
    tower_settings_from_tensors,
)
from .original_processor import add_image_token, build_processor, detect_chat_template, load_original_tokenizer


logger = logging.get_logger(__name__)

# Where an original checkpoint keeps its tower after pretraining, beside the shards.
TOWER_DIRECTORY = "vision_tower"
# Files of a Florence-2 that are downloaded where the checkpoint has the weights.
TOWER_CONFIG_FILES = ("config.json", "preprocessor_config.json", "processor_config.json")
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
    assumptions: list[str] = field(default_factory=list)  # sentences about what the original does not say
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
    stored = read_tensors(complete)
    if not stored and is_adapter(complete):
        raise CheckpointError(f"{complete} holds only an adapter; give its base model as --base.")
    if base is not None and read_json(complete / "config.json").get("model_type") == FlorenceVLConfig.model_type:
        config, processor = FlorenceVLConfig.from_pretrained(complete), FlorenceVLProcessor.from_pretrained(complete)
        check_tensors(stored, tensor_shapes(config))
        checkpoint = ConvertedCheckpoint(config, processor, GenerationConfig.from_pretrained(complete))
        checkpoint.tensors = {name: tensor.to(dtype or tensor.dtype) for name, tensor in stored.items()}
        config.dtype = checkpoint.tensors[EMBEDDING_TABLES[0]].dtype
    else:
        tower = None if vision_tower is None else resolve_checkpoint(vision_tower, TOWER_CONFIG_FILES)
        checkpoint = _read_settings(complete, stored, tower, image_feature_source, chat_template)
        if not any(name.startswith(ORIGINAL_TOWER) for name in stored):
            tower = resolve_checkpoint(vision_tower or complete / TOWER_DIRECTORY)
            stored |= {ORIGINAL_TOWER + name: tensor for name, tensor in read_tower_tensors(tower).items()}
        convert_tensors(checkpoint, stored, dtype)
    if base is not None:
        checkpoint.tensors = apply_adapter(checkpoint.tensors, source)
    return checkpoint


def read_settings(path_or_id: str | Path) -> ConvertedCheckpoint:
    """Read an original checkpoint except for its tensors: their shapes too if its tower has no configuration."""
    source = resolve_checkpoint(path_or_id, SETTINGS_FILES)
    if (source / TOWER_DIRECTORY / "config.json").is_file():
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
    tower_tensors = {
        name.removeprefix(ORIGINAL_TOWER): tensor
        for name, tensor in (stored or {}).items()
        if name.startswith(ORIGINAL_TOWER)
    }
    has_davit = has_tower_config or any(name.startswith("vision_tower.blocks.") for name in tower_tensors)
    check_is_florence_vl(original, has_davit, source)
    if stored is not None and not stored:
        raise CheckpointError(f"{source} holds no weights; download its model-*.safetensors or pytorch_model-*.bin.")
    if vision_tower is None and has_tower_config:
        vision_tower = tower_directory
    if vision_tower is None:
        tower = tower_settings_from_tensors(tower_tensors, image_feature_source)
    else:
        tower = tower_settings_from_directory(vision_tower, image_feature_source)
    tokenizer = load_original_tokenizer(source)
    return build_settings(
        source,
        tower,
        text_config_from_original(original),
        tokenizer,
        chat_template or detect_chat_template(original["model_type"], tokenizer),
        do_pad=original.get("image_aspect_ratio") == "pad",  # after finetuning only
        projector_depth=int(original["mm_projector_type"].removeprefix("mlp").removesuffix("x_gelu")),
    )


def build_settings(
    directory: Path,
    tower: TowerSettings,
    text_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str,
    do_pad: bool,
    **settings: Any,
) -> ConvertedCheckpoint:
    """Combine a vision tower and a language model, whose directory is given and whose tokenizer gets `<image>`."""
    num_original_rows = text_config.vocab_size
    image_token_id, text_config.vocab_size = add_image_token(tokenizer, num_original_rows)
    try:
        config = FlorenceVLConfig(
            vision_config=tower.config,
            text_config=text_config,
            image_token_id=image_token_id,
            image_size=tower.image_size,
            image_feature_source=tower.image_feature_source,
            architectures=[FlorenceVLForConditionalGeneration.__name__],
            **settings,
        )
    except ValueError as error:
        raise CheckpointError(f"The configuration of {directory} contradicts itself: {error}") from error
    for assumption in tower.assumptions:
        logger.warning(assumption)
    return ConvertedCheckpoint(
        config,
        build_processor(tower, tokenizer, config.num_image_tokens, do_pad, chat_template),
        read_generation_config(directory, config, num_original_rows),
        assumptions=tower.assumptions,
        chat_template=chat_template,
        num_added_rows=text_config.vocab_size - num_original_rows,
    )


def read_tower_tensors(directory: Path) -> dict[str, LazyTensor]:
    """List the tensors of a Florence-2, in the layout of its first release or of Transformers."""
    # Older versions of Transformers, and the base model alone, do not save the prefix.
    return {name.removeprefix("model."): tensor for name, tensor in read_tensors(directory).items()}


def convert_tensors(checkpoint: ConvertedCheckpoint, stored: dict[str, LazyTensor], dtype: torch.dtype | None) -> None:
    """Add the tensors of an original, given by name, to a checkpoint in the model's order, cast to `dtype`."""
    shapes = tensor_shapes(checkpoint.config)
    mapped = {name: to for name in stored if (to := to_converted(name))}
    known = {None, LM_HEAD, *shapes}
    unknown = [str(tensor) for name, tensor in stored.items() if name not in mapped or mapped[name].name not in known]
    # A tied tensor may be stored under several names: the one that the key table lists first is used.
    preferred = [ORIGINAL_TOWER + name for name in reversed(TIED_WORDS)]
    sources = {mapped[name].name: name for name in (*mapped, *preferred) if name in mapped}
    check_all_paired(unknown, [str(to_original(name)[0].name) for name in shapes if name not in sources])
    for name, shape in shapes.items():
        tensor, is_transposed = stored[sources[name]], mapped[sources[name]].transposed
        num_rows = shape[0] - checkpoint.num_added_rows if name in EMBEDDING_TABLES else shape[0]
        expected = (num_rows, *shape[1:])
        check_shape(tensor, expected[::-1] if is_transposed else expected)
        tensor = tensor.transposed() if is_transposed else tensor
        # Rows for `<image>` and up to the next multiple of 64 are zero, so that they are the same on every machine.
        checkpoint.tensors[name] = tensor.with_rows(shape[0]).to(dtype or tensor.dtype)
    checkpoint.unused = sorted(stored.keys() - {sources[name] for name in shapes})
    checkpoint.config.dtype = checkpoint.tensors[EMBEDDING_TABLES[0]].dtype


def tensor_shapes(config: FlorenceVLConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors of a model that are stored, by name."""
    with torch.device("meta"):
        model = FlorenceVLForConditionalGeneration(config)
    tied = {LM_HEAD} if config.tie_word_embeddings else set()
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def check_tensors(
    tensors: dict[str, LazyTensor], shapes: dict[str, tuple[int, ...]], remedy: str = "save the model again"
) -> None:
    """Refuse tensors that do not have exactly these names and shapes."""
    unknown = [str(tensor) for name, tensor in tensors.items() if name not in (*shapes, LM_HEAD)]
    check_all_paired(unknown, [name for name in shapes if name not in tensors])
    for name, shape in shapes.items():
        check_shape(tensors[name], shape, remedy)


def check_shape(tensor: LazyTensor, expected: tuple[int, ...], remedy: str = "download both again") -> None:
    """Refuse a tensor of another shape than the configuration gives it."""
    if tensor.shape != expected:
        raise CheckpointError(
            f"{tensor} has shape {tensor.shape}, expected {expected} from the configuration; {remedy}."
        )


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
