# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Adapters through peft: where LoRA goes, what is quantized below it, and how an adapter becomes part of its base."""

import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils import logging

from ..conversion import CheckpointError
from ..conversion.checkpoint_files import CHECKPOINT_FILES, output_directory, read_json, resolve_checkpoint
from ..conversion.original_config import TEXT_MODEL_TYPES
from ..model_cards import CARD_FILE, MergedCard, read_metadata, read_training, write_card
from ..modeling import FlorenceVLConfig, FlorenceVLForConditionalGeneration
from ..processing import FlorenceVLProcessor


logger = logging.get_logger(__name__)

PROJECTOR = "multi_modal_projector"
# All but the language model. Entries must name a part as the model does, from the start: `model.vision_tower` within
# the model that generates, `vision_tower` within the bare one. A list of one's own drops the default, so the head too.
NOT_QUANTIZED = ("lm_head", "vision_tower", PROJECTOR, "model.vision_tower", f"model.{PROJECTOR}")

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PROCESSOR_CONFIG = "processor_config.json"
FILES = [*CHECKPOINT_FILES, "*.jinja", CARD_FILE]


def lora_target_modules(model: PreTrainedModel) -> str:
    """
    A pattern for peft that matches each linear layer of the language model, and none of the tower, the projector or
    the head.

    Args:
        model (`PreTrainedModel`): A Florence-VL, with or without its head, quantized or not.

    Returns:
        `str`: A regular expression that the names of these modules match as a whole.

    Raises:
        ValueError: If the model is no Florence-VL, or its language model has no linear layer.
    """
    language_model = getattr(getattr(model, "base_model", model), "language_model", None)
    if language_model is None or isinstance(model, PeftModel):
        raise ValueError(
            f"Got a {type(model).__name__}, which has no `language_model`; give a Florence-VL that peft has not "
            f"wrapped yet."
        )
    # Layers of bitsandbytes are subclasses; torchao changes the weight alone.
    names = [name for name, module in language_model.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        raise ValueError(
            f"{type(language_model).__name__} has no linear layer for LoRA to change; name its parameters in "
            f"`target_parameters` of peft's LoraConfig."
        )
    experts = [name for name, weight in language_model.named_parameters() if weight.dim() == 3 and "expert" in name]
    if experts:
        kinds = sorted({".".join(name.rsplit(".", 2)[-2:]) for name in experts})
        logger.warning_once(
            f"The weights of {type(language_model).__name__}'s experts are no linear layers, so LoRA leaves them as "
            f"they are. To train them too, pass `target_parameters={kinds}` and a dropout of 0 to `lora_config`."
        )
    # One alternative for all layers that differ in their number alone.
    paths = (r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split(".")) for name in names)
    return rf"(?:model\.)?language_model\.(?:{'|'.join(dict.fromkeys(paths))})"


def lora_config(
    model: PreTrainedModel,
    rank: int = 64,
    alpha: float = 16,
    dropout: float = 0.05,
    train_projector: bool = False,
    **settings: Any,
) -> LoraConfig:
    """
    LoRA on each linear layer of the language model, with the original's numbers.

    Args:
        model (`PreTrainedModel`): A Florence-VL.
        rank (`int`, *optional*, defaults to 64): Of the changes.
        alpha (`float`, *optional*, defaults to 16): Changes are multiplied by `alpha / rank`.
        dropout (`float`, *optional*, defaults to 0.05): On what goes into a change, in training.
        train_projector (`bool`, *optional*, defaults to `False`): Whether the projector is trained too, as a whole.
        settings: Further ones of `peft.LoraConfig`, such as `use_dora` or `target_parameters`.
    """
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=lora_target_modules(model),
        modules_to_save=[PROJECTOR] if train_projector else None,
        **settings,
    )


def quantization_config(bits: int, compute_dtype: torch.dtype = torch.bfloat16) -> BitsAndBytesConfig:
    """
    Quantize the language model alone: tower, projector and head keep their precision.

    Args:
        bits (`int`): 4, as QLoRA does it (NF4, constants quantized too), or 8 (LLM.int8).
        compute_dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`): In which 4-bit layers compute.
    """
    if bits == 4:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
            llm_int8_skip_modules=list(NOT_QUANTIZED),
        )
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(NOT_QUANTIZED))
    raise ValueError(f"Got {bits!r} bits, expected 4 or 8; leave the model unquantized for more.")


def merge_adapter(
    adapter: str | Path,
    output: str | Path,
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
) -> FlorenceVLForConditionalGeneration:
    """
    Merge an adapter into its base and write the model, which loads through the Auto classes.

    Args:
        adapter (`str` or `Path`): Folder or Hub id of what peft saved: `adapter_config.json` and
            `adapter_model.safetensors`, and maybe a processor, which goes with the model.
        output (`str` or `Path`): Folder to make. It appears when it is complete.
        base (`str` or `Path`, *optional*): Folder or Hub id of the model below, not quantized. By default, the one
            that `adapter_config.json` names.
        dtype (`torch.dtype`, *optional*): Of the model. By default, as the base is stored.
        max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`): Size of a file of weights at most.

    Returns:
        `FlorenceVLForConditionalGeneration`: The merged model.

    Raises:
        CheckpointError: If the adapter is none, or does not fit its base. Nothing is written then.
    """
    with output_directory(Path(output)) as folder:
        adapter_folder = resolve_checkpoint(adapter, FILES)
        config = _read_adapter_config(adapter_folder)
        base_folder = _find_base(config, base)
        model = FlorenceVLForConditionalGeneration.from_pretrained(base_folder, dtype=dtype or "auto")
        merged = _merge(model, config, adapter_folder, base_folder)
        merged.save_pretrained(folder, max_shard_size=max_shard_size)
        has_processor = (adapter_folder / PROCESSOR_CONFIG).is_file()
        FlorenceVLProcessor.from_pretrained(adapter_folder if has_processor else base_folder).save_pretrained(folder)
        card = MergedCard(
            name=Path(output).name,
            config=merged.config,
            processor=FlorenceVLProcessor.from_pretrained(folder),
            base=base or config.base_model_name_or_path,
            adapter=adapter,
            num_parameters=merged.num_parameters(),
            training=read_training(adapter_folder),
            adapter_metadata=read_metadata(adapter_folder),
        )
        write_card(folder, card)
    return merged


def _read_adapter_config(folder: Path) -> PeftConfig:
    read_json(folder / ADAPTER_CONFIG)  # says clearly if there is none
    if (folder / "non_lora_trainables.bin").is_file():
        raise CheckpointError(
            f"{folder} holds an adapter in the original's layout; use `florence-vl convert` with `--base`."
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise CheckpointError(
            f"{folder} has {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}; fetch it, or save the adapter again with "
            f"`safe_serialization=True`: other formats may run code and are not read."
        )
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG} is not one that the installed peft reads ({error}); update peft, or save the "
            f"adapter again."
        ) from error
    if config.peft_type != PeftType.LORA:
        raise CheckpointError(
            f"{folder} holds an adapter of type {config.peft_type.value}, expected LORA; load it with peft."
        )
    return config


def _find_base(config: PeftConfig, base: str | Path | None) -> Path:
    named = base or config.base_model_name_or_path
    if not named:
        raise CheckpointError(f"{ADAPTER_CONFIG} names no base model; name it, with `--base` on the command line.")
    try:
        folder = resolve_checkpoint(named, FILES, revision=None if base else config.revision)
    except CheckpointError as error:
        hint = "" if base else f" {ADAPTER_CONFIG} names it as the base; name another, with `--base`."
        raise CheckpointError(f"{error}{hint}") from error
    settings = read_json(folder / "config.json")
    known = (FlorenceVLConfig.model_type, *TEXT_MODEL_TYPES)
    if settings.get("model_type") not in known:
        raise CheckpointError(
            f"The base {named} has model type {settings.get('model_type')!r}, expected "
            f"{FlorenceVLConfig.model_type!r}; give the Florence-VL that the adapter was trained on."
        )
    if settings.get("quantization_config"):
        raise CheckpointError(
            f"The base {named} is quantized, so merging would round the adapter away; name the model that it was "
            f"quantized from, with `--base` on the command line."
        )
    return folder


def _merge(
    model: FlorenceVLForConditionalGeneration, config: PeftConfig, adapter: Path, base: Path
) -> FlorenceVLForConditionalGeneration:
    config.inference_mode = True
    try:
        # Not on the meta device: some ways to initialize LoRA, such as PiSSA, change the base, and must do so again.
        wrapped = PeftModel(model, config)
        # Not `PeftModel.from_pretrained`, which only warns of what is missing, and is silent about what is too much.
        loaded = wrapped.load_adapter(str(adapter), "default", torch_device="cpu")
        if unpaired := [*loaded.missing_keys, *loaded.unexpected_keys]:
            raise ValueError(f"{len(unpaired)} tensors are missing or have no place, such as {unpaired[0]}")
        return wrapped.merge_and_unload(safe_merge=True)
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"The adapter in {adapter} cannot be merged into {base}; give the base that it was trained on. "
            f"What is wrong: {error}"
        ) from error


__all__ = ["lora_config", "lora_target_modules", "merge_adapter", "quantization_config"]
