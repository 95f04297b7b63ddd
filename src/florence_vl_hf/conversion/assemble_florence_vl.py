# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""A new Florence-VL, put together from a Florence-2 and a language model, with a projector to be pretrained."""

from functools import partial
from pathlib import Path

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    BartTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from ..modeling import FlorenceVLConfig, FlorenceVLForConditionalGeneration
from ..modeling.configuration_florence_vl import DEFAULT_PROMPTS
from .convert_florence_vl_to_hf import (
    CHECKPOINT_FILES,
    ConversionPlan,
    plan_tensors,
    read_generation_config,
    resolve_folder,
    tensor_shapes,
    write_model,
)
from .errors import CheckpointError
from .key_mapping import ORIGINAL_TOWER, to_original
from .original_config import tower_settings_from_folder
from .original_model import find_tower_tensors
from .original_processor import add_image_token, build_processor, load_original_tokenizer
from .output_folder import folder_in_place_when_complete
from .stored_tensors import StoredTensor, find_tensors


logger = logging.get_logger(__name__)

PROJECTOR = "model.multi_modal_projector."
# The paper pretrains on pictures and their captions alone.
PRETRAINING_CHAT_TEMPLATE = "plain"
# Names under which tokenizers keep a token that is free for padding, Llama-3's first.
PADDING_TOKENS = ("<|finetune_right_pad_id|>", "<pad>", "<|pad|>", "[PAD]", "<PAD>")


def assemble(
    vision_tower: str | Path,
    llm: str | Path,
    output: str | Path,
    fusion_strategy: str = "channel",
    fusion_features: list[str] | None = None,
    prompts: dict[str, str] | None = None,
    image_feature_source: list[str] | None = None,
    projector_depth: int = 3,
    dtype: torch.dtype | None = None,
    chat_template: str = PRETRAINING_CHAT_TEMPLATE,
    max_shard_size: int | str = "5GB",
) -> ConversionPlan:
    """
    Put a Florence-2 and a language model together into a Florence-VL whose projector is untrained.

    Args:
        vision_tower (`str` or `Path`): Folder or Hub id of a Florence-2, in the layout of its first release, such as
            `microsoft/Florence-2-large-ft`, or in Transformers' own, such as `florence-community/Florence-2-large-ft`.
        llm (`str` or `Path`): Folder or Hub id of a causal language model.
        output (`str` or `Path`): Folder to make. It appears when it is complete.
        fusion_strategy (`str`, *optional*, defaults to `"channel"`): `channel`, `token` or `average`.
        fusion_features (`list[str]`, *optional*): `image` and names of prompts, in order. By default, all.
        prompts (`dict[str, str]`, *optional*): Prompts by name, beside the paper's three or instead of them. They are
            tokenized with the tower's tokenizer.
        image_feature_source (`list[str]`, *optional*): Instead of what the tower's configuration says.
        projector_depth (`int`, *optional*, defaults to 3): Number of linear layers of the projector.
        dtype (`torch.dtype`, *optional*): Of all weights. By default, the language model's.
        chat_template (`str`, *optional*, defaults to `"plain"`): One of `CHAT_TEMPLATES`.
        max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`): Size of a file of weights at most.

    Returns:
        `ConversionPlan`: What was written, with what had to be assumed.

    Raises:
        CheckpointError: If the parts cannot be put together. Nothing is written then.
    """
    with folder_in_place_when_complete(Path(output)) as folder:
        plan = plan_assembly(
            resolve_folder(vision_tower, CHECKPOINT_FILES),
            resolve_folder(llm, CHECKPOINT_FILES),
            fusion_strategy,
            fusion_features,
            prompts,
            image_feature_source,
            projector_depth,
            dtype,
            chat_template,
        )
        for assumed in plan.assumptions:
            logger.warning(assumed)
        write_model(plan, folder, max_shard_size)
    return plan


def plan_assembly(
    vision_tower: Path,
    llm: Path,
    fusion_strategy: str = "channel",
    fusion_features: list[str] | None = None,
    prompts: dict[str, str] | None = None,
    image_feature_source: list[str] | None = None,
    projector_depth: int = 3,
    dtype: torch.dtype | None = None,
    chat_template: str = PRETRAINING_CHAT_TEMPLATE,
) -> ConversionPlan:
    """
    Read both folders, without their weights, and check that they can be put together. Arguments are as of `assemble`.

    Raises:
        CheckpointError: If they cannot. The message says why.
    """
    tower = tower_settings_from_folder(vision_tower)
    tower.override_image_feature_source(image_feature_source)
    text_config, tokenizer = _read_text_config(llm), load_original_tokenizer(llm)
    assumptions = [*tower.assumptions, *_ensure_padding(tokenizer)]
    num_original_rows = text_config.vocab_size
    image_token_id, text_config.vocab_size = add_image_token(tokenizer, num_original_rows)
    text_config.pad_token_id = tokenizer.pad_token_id
    prompts = prompts or {}
    try:
        config = FlorenceVLConfig(
            vision_config=tower.config,
            text_config=text_config,
            image_token_id=image_token_id,
            image_size=tower.image_size,
            image_feature_source=tower.image_feature_source,
            fusion_strategy=fusion_strategy,
            fusion_features=fusion_features,
            prompts=DEFAULT_PROMPTS | prompts,
            prompt_token_ids=_tokenize(prompts, vision_tower) if prompts else None,
            projector_depth=projector_depth,
            architectures=[FlorenceVLForConditionalGeneration.__name__],
        )
    except ValueError as error:
        raise CheckpointError(f"{vision_tower} and {llm} cannot be put together so: {error}") from error

    stored = find_tensors(llm)
    words = stored.get("model.embed_tokens.weight")
    if words is None or not words.dtype.is_floating_point:
        raise CheckpointError(
            f"{llm} holds no model.embed_tokens.weight of floating point, as Llama, Phi-3, Mistral, Qwen and their "
            f"like have; give one of these, not quantized."
        )
    config.dtype = dtype or words.dtype
    stored |= {ORIGINAL_TOWER + name: tensor for name, tensor in find_tower_tensors(vision_tower).items()}
    stored |= _new_projector(config)
    return ConversionPlan(
        config=config,
        # Pretraining does not pad pictures.
        processor=build_processor(tower, tokenizer, config.num_image_tokens, False, chat_template),
        generation_config=read_generation_config(llm, config, num_original_rows),
        tensors=plan_tensors(config, stored, num_original_rows, config.dtype),
        assumptions=assumptions,
        unused=[],
        chat_template=chat_template,
    )


def _read_text_config(llm: Path) -> PreTrainedConfig:
    """The configuration of a causal language model, without what it says of its own checkpoint."""
    try:
        config = AutoConfig.from_pretrained(llm, trust_remote_code=False)
    except Exception as error:
        # An unknown model type, a damaged file, contradicting settings: Transformers says it, in many exceptions.
        raise CheckpointError(f"The configuration of {llm} cannot be loaded: {error}") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.get_text_config() is not config:
        raise CheckpointError(
            f"{llm} has model type {config.model_type!r}, expected a causal language model of text alone, such as "
            f"llama or phi3."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(f"The weights of {llm} are quantized; give the model that they were made from.")
    config.architectures = config.dtype = None
    config.name_or_path = ""
    vars(config).pop("auto_map", None)
    return config


def _ensure_padding(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Padding needs a token; of those that the tokenizer has, the one that text needs least. Says which."""
    if tokenizer.pad_token is not None:
        return []
    vocabulary = tokenizer.get_vocab()
    candidates = [token for token in PADDING_TOKENS if token in vocabulary]
    candidates += [token for token in (tokenizer.unk_token, tokenizer.eos_token) if token is not None]
    if not candidates:
        raise CheckpointError("The tokenizer of the language model has no token for padding; name one as `pad_token`.")
    tokenizer.pad_token = candidates[0]
    return [f"The tokenizer of the language model names no token for padding: {candidates[0]} is taken."]


def _tokenize(prompts: dict[str, str], vision_tower: Path) -> dict[str, list[int]]:
    # Florence-2's is BART's, whatever its first release calls it.
    tokenizer = load_original_tokenizer(vision_tower, BartTokenizer)
    return {name: tokenizer(text).input_ids for name, text in prompts.items()}


def _new_projector(config: FlorenceVLConfig) -> dict[str, StoredTensor]:
    """Tensors of an untrained projector, under the original's names, as if they were stored."""
    std = getattr(config.text_config, "initializer_range", None) or 0.02
    shapes = {name: shape for name, shape in tensor_shapes(config).items() if name.startswith(PROJECTOR)}
    projector = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        original = to_original(name)[0].name
        read = partial(_new_tensor, shape, std if len(shape) > 1 else 0.0, seed)
        projector[original] = StoredTensor(original, Path("the new projector"), torch.float32, shape, read)
    return projector


def _new_tensor(shape: tuple[int, ...], std: float, seed: int) -> torch.Tensor:
    # Each with its own seed: the same on every machine and in any order.
    generator = torch.Generator().manual_seed(seed)
    return torch.zeros(shape).normal_(0.0, std, generator=generator) if std else torch.zeros(shape)


__all__ = ["PRETRAINING_CHAT_TEMPLATE", "assemble", "plan_assembly"]
