# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""LoRA with peft: where it is applied, and merging it into its base model."""

import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn
from transformers import PreTrainedModel

from ..conversion import CheckpointError, load_pretrained
from ..conversion.checkpoint_files import CHECKPOINT_FILES, output_directory, read_json, resolve_checkpoint
from ..conversion.original_adapters import check_patterns
from ..model_cards import CARD_FILE, MergedCard, read_metadata, read_training, write_card
from ..modeling import FlorenceVLForConditionalGeneration
from ..processing import FlorenceVLProcessor


PROJECTOR = "multi_modal_projector"
FILES = (*CHECKPOINT_FILES, "*.jinja", CARD_FILE)


def lora_target_modules(model: nn.Module) -> str:
    """
    Return a regular expression of the names of all linear layers of the language model, and of no other module.

    Args:
        model (`nn.Module`): A Florence-VL model, with or without its head, quantized or not.

    Returns:
        `str`: For `LoraConfig.target_modules`.

    Raises:
        ValueError: If the model is not a Florence-VL, or its language model has no linear layer.
    """
    language_model = getattr(getattr(model, "base_model", model), "language_model", None)
    if language_model is None or isinstance(model, PeftModel):
        raise ValueError(f"Got a {type(model).__name__}; give a Florence-VL without adapters.")
    # The layers of bitsandbytes are subclasses; torchao only changes the weight.
    names = [name for name, module in language_model.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        raise ValueError(f"{type(language_model).__name__} has no linear layer; use peft's `target_parameters`.")
    # One alternative for all layers that differ only in their number.
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
    Configure LoRA on each linear layer of the language model, by default with the original's settings.

    Args:
        model (`PreTrainedModel`): A Florence-VL model.
        rank (`int`, *optional*, defaults to 64): Rank of the update matrices.
        alpha (`float`, *optional*, defaults to 16): Updates are scaled by `alpha / rank`.
        dropout (`float`, *optional*, defaults to 0.05): Dropout on the input of LoRA layers.
        train_projector (`bool`, *optional*, defaults to `False`): Whether to train the projector too, in full.
        settings: Further arguments of `peft.LoraConfig`, such as `use_dora`; or `target_parameters` and `dropout=0`,
            to train the experts of a mixture too, which are not linear layers.
    """
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type] # not only integers
        lora_dropout=dropout,
        target_modules=lora_target_modules(model),
        modules_to_save=[PROJECTOR] if train_projector else None,
        **settings,
    )


def merge_adapter(
    adapter: str | Path,
    output: str | Path,
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "1GB",
) -> FlorenceVLForConditionalGeneration:
    """
    Merge a LoRA adapter into its base model, and save the model.

    Args:
        adapter (`str` or `Path`): Directory or Hub id of an adapter that peft saved: `adapter_config.json`,
            `adapter_model.safetensors`, and optionally a processor, which is then saved with the model.
        output (`str` or `Path`): Output directory. It appears when it is complete.
        base (`str` or `Path`, *optional*): Directory or Hub id of the base model, not quantized. By default, the one
            in `adapter_config.json`.
        dtype (`torch.dtype`, *optional*): dtype of the model. By default, as in the base model.
        max_shard_size (`int` or `str`, *optional*, defaults to `"1GB"`): Maximum size of a file of weights.

    Returns:
        `FlorenceVLForConditionalGeneration`: The merged model.

    Raises:
        CheckpointError: If there is no LoRA adapter, or it does not fit its base model. Nothing is written then.
    """
    with output_directory(Path(output)) as directory:
        adapter_directory = resolve_checkpoint(adapter, FILES)
        config = _read_adapter_config(adapter_directory)
        revision = None if base else config.get("revision")
        base = base or config.get("base_model_name_or_path") or ""
        base_directory = _resolve_base(base, revision)
        model, processor = load_pretrained(base_directory, dtype=dtype or "auto")
        merged = _merge(model, adapter_directory)
        merged.save_pretrained(directory, max_shard_size=max_shard_size)
        if (adapter_directory / "processor_config.json").is_file():
            processor = FlorenceVLProcessor.from_pretrained(adapter_directory)
        processor.save_pretrained(directory)
        card = MergedCard(
            name=Path(output).name,
            config=merged.config,
            processor=processor,
            base=base,
            adapter=adapter,
            num_parameters=merged.num_parameters(),
            training=read_training(adapter_directory),
            adapter_metadata=read_metadata(adapter_directory),
        )
        write_card(directory, card)
    return merged


def _read_adapter_config(directory: Path) -> dict[str, Any]:
    config = read_json(directory / CONFIG_NAME)
    is_original = (directory / "non_lora_trainables.bin").is_file()
    if is_original or not (directory / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise CheckpointError(
            f"{directory} has no {SAFETENSORS_WEIGHTS_NAME} that peft saved; save the adapter in safetensors, since "
            f"other formats can run code. `florence-vl convert` with `--base` reads an adapter of the original code."
        )
    if config.get("peft_type") != PeftType.LORA:
        raise CheckpointError(f"{directory} has an adapter of type {config.get('peft_type')}, expected LORA.")
    check_patterns(config)
    return config


def _resolve_base(base: str | Path, revision: str | None) -> Path:
    try:
        directory = resolve_checkpoint(base, FILES, revision=revision)
    except CheckpointError as error:
        raise CheckpointError(f"The adapter's base model cannot be read; give it with `--base`. {error}") from error
    if read_json(directory / "config.json").get("quantization_config"):
        raise CheckpointError(f"{base} is quantized; give the model that it was quantized from, with `--base`.")
    return directory


def _merge(model: FlorenceVLForConditionalGeneration, adapter: Path) -> FlorenceVLForConditionalGeneration:
    try:
        config = PeftConfig.from_pretrained(str(adapter), inference_mode=True)
        # Not on the meta device: some initializations of LoRA, such as PiSSA, change the base model.
        wrapped = PeftModel(model, config)
        # `PeftModel.from_pretrained` only warns of missing tensors, and ignores unexpected ones.
        loaded = wrapped.load_adapter(str(adapter), "default", torch_device="cpu")
        if wrong := [*loaded.missing_keys, *loaded.unexpected_keys]:
            raise ValueError(f"{len(wrong)} tensors are missing or unexpected, such as {wrong[0]}")
        return wrapped.merge_and_unload(safe_merge=True)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"The adapter in {adapter} does not fit {model.name_or_path}; give the base model that it was trained on, "
            f"or update peft. {error}"
        ) from error
