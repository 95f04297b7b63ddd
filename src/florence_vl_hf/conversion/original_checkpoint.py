# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""An original checkpoint in this package's layout: checked from end to end, with weights that are read on demand."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.dynamic_module_utils import custom_object_save

from ..modeling import FlorenceVLConfig, FlorenceVLForConditionalGeneration
from ..processing import FlorenceVLProcessor
from .checkpoint_files import CheckpointError, LazyTensor, read_json, read_tensors, write_tensors
from .key_mapping import ORIGINAL_TOWER, TIED_WORDS, to_converted, to_first_release, to_original
from .original_adapters import apply_adapter, is_adapter
from .original_config import (
    Assumption,
    check_is_florence_vl,
    text_config_from_original,
    tower_settings_from_directory,
    tower_settings_from_tensors,
)
from .original_processor import add_image_token, build_processor, detect_chat_template, load_original_tokenizer


# Where an original checkpoint keeps its tower after pretraining, beside the shards.
TOWER_DIRECTORY = "vision_tower"
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
    assumptions: list[Assumption]
    unused: list[str]  # names of stored tensors
    chat_template: str | None  # one of `CHAT_TEMPLATES`; `None` for the one of an adapter's base
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
    source: Path,
    *,
    base: Path | None = None,
    vision_tower: Path | None = None,
    image_feature_source: list[str] | None = None,
    dtype: torch.dtype | None = None,
    chat_template: str | None = None,
) -> ConvertedCheckpoint:
    """
    Read an original checkpoint without its weights, and check that all of it can be converted.

    Args:
        source (`Path`): Directory of the original checkpoint, or of an adapter for `base`.
        base (`Path`, *optional*): Directory of an adapter's base model, in the original's layout or in this package's.
        vision_tower (`Path`, *optional*): Directory of a Florence-2, if the checkpoint has none. The checkpoint's own
            weights take precedence over this directory's.
        image_feature_source (`list[str]`, *optional*): Overrides the tower's configuration.
        dtype (`torch.dtype`, *optional*): Dtype of the weights. By default each tensor keeps its own.
        chat_template (`str`, *optional*): One of `CHAT_TEMPLATES`. By default, detected from the language model.

    Raises:
        CheckpointError: If anything is missing, unexpected, misshapen or damaged. The message names file and tensor.
    """
    if base is not None:
        if not is_adapter(source) or read_tensors(source):
            raise CheckpointError(f"{source} is not a projector or LoRA checkpoint; convert it without --base.")
        if read_json(base / "config.json").get("model_type") == FlorenceVLConfig.model_type:
            checkpoint = _read_converted(base, dtype)
        else:
            checkpoint = read_original(
                base,
                vision_tower=vision_tower,
                image_feature_source=image_feature_source,
                dtype=dtype,
                chat_template=chat_template,
            )
        checkpoint.tensors = apply_adapter(checkpoint.tensors, source)
        return checkpoint

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
    image_token_id, text_config.vocab_size = add_image_token(tokenizer, num_original_rows)
    try:
        config = FlorenceVLConfig(
            vision_config=tower.config,
            text_config=text_config,
            image_token_id=image_token_id,
            image_size=tower.image_size,
            image_feature_source=tower.image_feature_source,
            projector_depth=int(original["mm_projector_type"].removeprefix("mlp").removesuffix("x_gelu")),
            projector_hidden_act="gelu",
            architectures=[FlorenceVLForConditionalGeneration.__name__],
        )
    except ValueError as error:
        raise CheckpointError(f"The configuration of {source} contradicts itself: {error}") from error
    tensors, unused = convert_tensors(config, stored, num_original_rows, dtype)
    config.dtype = tensors[EMBEDDING_TABLES[0]].dtype
    do_pad = original.get("image_aspect_ratio") == "pad"  # after finetuning only
    return ConvertedCheckpoint(
        config=config,
        processor=build_processor(tower, tokenizer, config.num_image_tokens, do_pad, chat_template),
        generation_config=read_generation_config(source, config, num_original_rows),
        tensors=tensors,
        assumptions=tower.assumptions,
        unused=unused,
        chat_template=chat_template,
        num_added_rows=text_config.vocab_size - num_original_rows,
    )


def _read_converted(directory: Path, dtype: torch.dtype | None) -> ConvertedCheckpoint:
    """Read a model in this package's layout, as the base of an adapter."""
    config = FlorenceVLConfig.from_pretrained(directory)
    tensors, shapes = read_tensors(directory), tensor_shapes(config)
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    if {name: tensor.shape for name, tensor in tensors.items()} != shapes:
        raise CheckpointError(
            f"The weights in {directory} do not match its config.json; save or convert the model again."
        )
    if dtype is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    config.dtype = tensors[EMBEDDING_TABLES[0]].dtype
    return ConvertedCheckpoint(
        config=config,
        processor=FlorenceVLProcessor.from_pretrained(directory),
        generation_config=GenerationConfig.from_pretrained(directory),
        tensors=tensors,
        assumptions=[],
        unused=[],
        chat_template=None,
    )


def read_tower_tensors(directory: Path) -> dict[str, LazyTensor]:
    """List the tensors of a Florence-2 by their names in its first release, whichever layout it has."""
    tensors = {}
    for name, tensor in read_tensors(directory).items():
        mapped = to_first_release(name)
        original = name if mapped is None or mapped.name is None else mapped.name
        tensors[original] = tensor.transposed() if mapped is not None and mapped.transposed else tensor
    return tensors


def convert_tensors(
    config: FlorenceVLConfig, stored: dict[str, LazyTensor], num_original_rows: int, dtype: torch.dtype | None = None
) -> tuple[dict[str, LazyTensor], list[str]]:
    """
    Map the tensors of an original checkpoint to those of the model, one to one.

    Args:
        config (`FlorenceVLConfig`): Configuration of the model.
        stored (`dict[str, LazyTensor]`): The original's tensors by its own names.
        num_original_rows (`int`): Rows of the original's embedding tables.
        dtype (`torch.dtype`, *optional*): Dtype of the weights. By default each tensor keeps its own.

    Returns:
        `tuple[dict[str, LazyTensor], list[str]]`: The model's tensors in its order, and the names of unused ones.
    """
    shapes = tensor_shapes(config)
    sources: dict[str, tuple[str, bool]] = {}  # original name and whether it is transposed, by converted name
    unknown = []
    for name in sorted(stored, key=_order_of_tied_names):
        mapped = to_converted(name)
        if mapped is None or (mapped.name is not None and mapped.name not in shapes):
            unknown.append(str(stored[name]))
        elif mapped.name is not None:
            sources.setdefault(mapped.name, (name, mapped.transposed))
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    check_all_paired(unknown, [to_original(name)[0].name or name for name in shapes if name not in sources])

    tensors = {}
    for name, shape in shapes.items():
        original_name, transposed = sources[name]
        tensor = stored[original_name]
        expected = (num_original_rows, *shape[1:]) if name in EMBEDDING_TABLES else shape
        expected = expected[::-1] if transposed else expected
        if tensor.shape != expected:
            raise CheckpointError(
                f"{tensor} has shape {tensor.shape}, expected {expected} from the configuration; the two do not match."
            )
        tensor = tensor.transposed() if transposed else tensor
        tensor = tensor if dtype is None else tensor.to(dtype)
        # Rows for `<image>` and up to the next multiple of 64 are zero, so that they are the same on every machine.
        tensors[name] = tensor.with_rows(shape[0]) if name in EMBEDDING_TABLES else tensor
    return tensors, sorted(set(stored) - {sources[name][0] for name in shapes})


def _order_of_tied_names(name: str) -> int:
    """A tied tensor may be stored under several names: the one that the key table lists first is used."""
    name = name.removeprefix(ORIGINAL_TOWER)
    return TIED_WORDS.index(name) if name in TIED_WORDS else 0


def tensor_shapes(config: FlorenceVLConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors of a model by name, tied ones included."""
    with torch.device("meta"):
        model = FlorenceVLForConditionalGeneration(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def check_all_paired(unknown: list[str], missing: list[str]) -> None:
    """Refuse a checkpoint with unknown or missing tensors, and name them."""
    if unknown or missing:
        raise CheckpointError(
            "The checkpoint does not match its configuration. "
            + (f"Tensors that nothing uses: {_some(unknown)}. " if unknown else "")
            + (f"Tensors that are missing: {_some(missing)}. " if missing else "")
            + "Download all of its files again; if they are complete, this kind of checkpoint is not supported."
        )


def _some(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def read_generation_config(source: Path, config: FlorenceVLConfig, num_original_rows: int) -> GenerationConfig:
    """Return the generation settings of a checkpoint, for a model with added rows in its embedding tables."""
    path = source / "generation_config.json"
    settings: dict[str, Any] = read_json(path) if path.is_file() else {}
    # Older versions of Transformers save flags that have no effect, newer ones refuse to.
    without_effect = () if settings.get("do_sample") else SAMPLING_FLAGS
    settings = {k: v for k, v in settings.items() if k not in without_effect and not k.startswith("_")}
    generation_config = GenerationConfig(**settings)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(generation_config, name) is None:
            setattr(generation_config, name, getattr(config.text_config, name))
    # Rows that were added to reach a multiple of 64 are no tokens. The model itself suppresses `<image>`.
    generation_config.suppress_tokens = list(range(num_original_rows, config.text_config.vocab_size)) or None
    return generation_config
