# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Assemble a new Florence-VL from a Florence-2 and a language model, with a projector to be pretrained."""

from functools import partial
from pathlib import Path
from typing import Literal

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    BartTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from ..modeling import FlorenceVLConfig
from ..modeling.configuration_florence_vl import DEFAULT_PROMPTS
from .checkpoint_files import (
    CheckpointError,
    LazyTensor,
    output_directory,
    read_json,
    read_tensors,
    resolve_checkpoint,
)
from .config_checks import check_layers
from .key_mapping import to_original
from .original_checkpoint import (
    ConvertedCheckpoint,
    build_settings,
    convert_tensors,
    read_tower_tensors,
    tensor_shapes,
)
from .original_config import Assumption, tower_settings_from_directory
from .original_processor import load_original_tokenizer


# Tokens of known tokenizers that are unused and can pad, Llama-3's first.
PADDING_TOKENS = ("<|finetune_right_pad_id|>", "<pad>", "<|pad|>", "[PAD]", "<PAD>")


def assemble(
    vision_tower: str | Path,
    llm: str | Path,
    output: str | Path,
    fusion_strategy: Literal["channel", "token", "average"] = "channel",
    fusion_features: list[str] | None = None,
    prompts: dict[str, str] | None = None,
    image_feature_source: list[str] | None = None,
    projector_depth: int = 3,
    dtype: torch.dtype | None = None,
    chat_template: str = "plain",
    max_shard_size: int | str = "1GB",
) -> ConvertedCheckpoint:
    """
    Assemble a Florence-VL with an untrained projector from a Florence-2 and a language model.

    Args:
        vision_tower (`str` or `Path`): Directory or Hub id of a Florence-2, in the layout of its first release, such
            as `microsoft/Florence-2-large-ft`, or in Transformers', such as `florence-community/Florence-2-large-ft`.
        llm (`str` or `Path`): Directory or Hub id of a causal language model.
        output (`str` or `Path`): Output directory. It is created when it is complete.
        fusion_strategy (`str`, *optional*, defaults to `"channel"`): `channel`, `token` or `average`.
        fusion_features (`list[str]`, *optional*): `image` and names of prompts, in order. By default, all.
        prompts (`dict[str, str]`, *optional*): Prompts by name, which add to the paper's three or override them. They
            are tokenized with the tower's tokenizer.
        image_feature_source (`list[str]`, *optional*): Overrides the tower's configuration.
        projector_depth (`int`, *optional*, defaults to 3): Number of linear layers of the projector.
        dtype (`torch.dtype`, *optional*): Dtype of all weights. By default, the language model's.
        chat_template (`str`, *optional*, defaults to `"plain"`): One of `CHAT_TEMPLATES`.
        max_shard_size (`int` or `str`, *optional*, defaults to `"1GB"`): Maximum size of a weight file.

    Returns:
        `ConvertedCheckpoint`: What was written, with what had to be assumed.

    Raises:
        ValueError: If the parts do not fit together, such as a `CheckpointError`. Nothing is written then.
    """
    with output_directory(Path(output)) as directory:
        tower_directory, llm_directory = resolve_checkpoint(vision_tower), resolve_checkpoint(llm)
        tower_tensors, stored = read_tower_tensors(tower_directory), read_tensors(llm_directory)
        tower = tower_settings_from_directory(tower_directory, len(tower_tensors))
        check_layers(read_json(llm_directory / "config.json"), len(stored), llm_directory / "config.json")
        text_config, tokenizer = _read_text_config(llm_directory), load_original_tokenizer(llm_directory)
        tower.assumptions.extend(_ensure_padding_token(tokenizer))
        text_config.pad_token_id = tokenizer.pad_token_id
        prompt_token_ids = None
        if prompts:
            # Florence-2's tokenizer is BART's, under whichever name its first release gives.
            tower_tokenizer = load_original_tokenizer(tower_directory, BartTokenizer)
            prompt_token_ids = {name: tower_tokenizer(text).input_ids for name, text in prompts.items()}
        checkpoint = build_settings(
            llm_directory,
            tower,
            text_config,
            tokenizer,
            chat_template,
            image_feature_source,
            do_pad=False,  # in pretraining, the paper only resizes images
            fusion_strategy=fusion_strategy,
            fusion_features=fusion_features,
            prompts=DEFAULT_PROMPTS | (prompts or {}),
            prompt_token_ids=prompt_token_ids,
            projector_depth=projector_depth,
        )
        embeddings = stored.get("model.embed_tokens.weight")
        if embeddings is None:
            raise CheckpointError(f"{llm} has no model.embed_tokens.weight; give a Llama, Phi-3, Mistral or Qwen.")
        stored |= tower_tensors | _new_projector(checkpoint.config)
        convert_tensors(checkpoint, stored, dtype or embeddings.dtype)
        checkpoint.save(directory, max_shard_size)
    return checkpoint


def _read_text_config(llm: Path) -> PreTrainedConfig:
    """Read the configuration of a causal language model, without what describes its own checkpoint."""
    try:
        config = AutoConfig.from_pretrained(llm, trust_remote_code=False)
    except Exception as error:  # Transformers raises many types, for unknown model types and damaged files
        raise CheckpointError(f"The configuration of {llm} cannot be loaded: {error}") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.get_text_config() is not config:
        raise CheckpointError(
            f"{llm} has model type {config.model_type!r}, expected a causal language model for text only, such as "
            f"llama or phi3."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(f"The weights of {llm} are quantized; give the model they were quantized from.")
    config.architectures = config.dtype = None
    config.name_or_path = ""
    vars(config).pop("auto_map", None)
    return config


def _ensure_padding_token(tokenizer: PreTrainedTokenizerBase) -> list[Assumption]:
    """Set a padding token if there is none: a reserved one, else the unknown or end token."""
    if tokenizer.pad_token is not None:
        return []
    vocabulary = tokenizer.get_vocab()
    candidates = [token for token in PADDING_TOKENS if token in vocabulary]
    candidates += [token for token in (tokenizer.unk_token, tokenizer.eos_token) if token is not None]
    if not candidates:
        raise CheckpointError("The tokenizer of the language model has no token that can pad; set its `pad_token`.")
    tokenizer.pad_token = candidates[0]
    return [Assumption.PADDING_TOKEN]


def _new_projector(config: FlorenceVLConfig) -> dict[str, LazyTensor]:
    """Return the tensors of an untrained projector by their original names."""
    std = getattr(config.text_config, "initializer_range", None) or 0.02
    shapes = {name: shape for name, shape in tensor_shapes(config).items() if ".multi_modal_projector." in name}

    def load(shape: tuple[int, ...], seed: int) -> torch.Tensor:
        # A seed per tensor gives the same values on every machine and in any order. Biases are zero.
        generator = torch.Generator().manual_seed(seed)
        return torch.zeros(shape).normal_(0.0, std if len(shape) > 1 else 0.0, generator=generator)

    names = [str(to_original(name)[0].name) for name in shapes]
    return {
        name: LazyTensor(name, Path("projector"), torch.float32, shape, partial(load, shape, seed))
        for seed, (name, shape) in enumerate(zip(names, shapes.values(), strict=True))
    }


__all__ = ["assemble"]
