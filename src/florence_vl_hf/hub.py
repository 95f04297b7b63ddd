# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Upload of complete models to the Hub."""

import glob
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import validate_repo_id
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import logging

from .conversion.checkpoint_files import CheckpointError, LazyTensor, is_directory, read_json, read_tensors
from .conversion.original_checkpoint import read_config, tensor_shapes
from .conversion.original_processor import TOKENIZER_FILES, read_processor
from .model_cards import CARD_FILE, Card, read_metadata, write_card
from .modeling import FlorenceVLConfig
from .modeling.configuration_florence_vl import AUTO_MAP
from .processing import FlorenceVLProcessor


logger = logging.get_logger(__name__)

# Files of a model beside its weights and code. Nothing else is uploaded: no optimizer states, no logs.
KNOWN_FILES = (
    *("config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json"),
    *("chat_template.jinja", "additional_chat_templates/*.jinja", *TOKENIZER_FILES),
    *("model.safetensors.index.json", CARD_FILE, "LICENSE*", "NOTICE*"),
)
# Entries of `auto_map` that each file must have.
AUTO_MAPS = {"config.json": AUTO_MAP, "processor_config.json": {"AutoProcessor": AUTO_MAP["AutoProcessor"]}}


def push(directory: str | Path, repo_id: str, private: bool = False, dry_run: bool = False) -> dict[str, int]:
    """
    Upload a model that was converted, trained or saved. A missing model card is written to its directory first.

    Args:
        directory (`str` or `Path`): Directory of the model.
        repo_id (`str`): `user/name` on the Hub. The repository is created if it does not exist.
        private (`bool`, *optional*, defaults to `False`): Whether the repository must be private.
        dry_run (`bool`, *optional*, defaults to `False`): Whether to check everything but upload nothing.

    Returns:
        `dict[str, int]`: The uploaded files and their sizes in bytes.

    Raises:
        CheckpointError: If the model is incomplete. Nothing is uploaded then.
        ValueError: If `repo_id` or the card is invalid, no token is set, or a private model would become public.
    """
    directory = Path(directory)
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"{repo_id!r} is not the id of a repository; give it as user/name.")
    files = files_to_push(directory, repo_id)
    if dry_run:
        return files
    if get_token() is None:
        raise ValueError("There is no token for the Hub; run `hf auth login`, or set HF_TOKEN.")
    api = HfApi(library_name="florence_vl_hf")
    api.create_repo(repo_id, private=private, exist_ok=True)
    # `create_repo` does not change a repository that exists.
    if private and not api.model_info(repo_id).private:
        raise ValueError(f"{repo_id} exists and is public; make it private first, or push without --private.")
    patterns = [glob.escape(name) for name in files]
    api.upload_folder(
        repo_id=repo_id, folder_path=directory, allow_patterns=patterns, commit_message="Upload Florence-VL"
    )
    return files


def files_to_push(directory: Path, name: str | None = None) -> dict[str, int]:
    """
    Check that a directory contains a complete model, write its card if there is none, and list its files with their
    sizes in bytes. `name` is that of the model in its card, by default the directory's.
    """
    is_directory(directory)
    tensors = read_tensors(directory)
    config = read_config(directory, tensors)
    files = _code_files(directory) | _weight_files(directory, config, tensors)
    processor = _load_processor(directory, config)
    card_file = directory / CARD_FILE
    if not card_file.exists():
        write_card(directory, Card(name=name or directory.resolve().name, config=config, processor=processor))
        logger.warning(f"Wrote {card_file}, since the model had no card; add what it was trained on, and its licence.")
    elif not read_metadata(directory):
        raise CheckpointError(f"{card_file} has no metadata; add it, or remove the file to get a generated card.")
    files |= {path for pattern in KNOWN_FILES for path in directory.glob(pattern) if path.is_file()}
    return {path.relative_to(directory).as_posix(): path.stat().st_size for path in sorted(files)}


def _code_files(directory: Path) -> set[Path]:
    missing = [
        f"`auto_map` in {file}"
        for file, auto_map in AUTO_MAPS.items()
        if not isinstance(found := read_json(directory / file).get("auto_map"), dict)
        or any(found.get(name) != reference for name, reference in auto_map.items())
    ]
    modules = {directory / f"{reference.partition('.')[0]}.py" for reference in AUTO_MAP.values()}
    try:
        modules |= {Path(imported) for module in sorted(modules) for imported in get_relative_import_files(module)}
    except FileNotFoundError as error:
        missing.append(Path(error.filename).name)
    if missing:
        raise CheckpointError(
            f"{directory} does not load where this package is not installed: it lacks {' and '.join(missing)}. Load "
            f"and save the model and the processor again: `save_pretrained` writes both."
        )
    return modules


def _weight_files(directory: Path, config: FlorenceVLConfig, tensors: dict[str, LazyTensor]) -> set[Path]:
    files = {tensor.file for tensor in tensors.values()}
    if {file.suffix for file in files} != {".safetensors"}:
        raise CheckpointError(f"{directory} has no complete model.safetensors; save the model with `save_pretrained`.")
    if missing := tensor_shapes(config).keys() - tensors.keys():
        raise CheckpointError(
            f"The weights in {directory} lack {len(missing)} tensors of the model, such as {min(missing)}; save the "
            f"model again."
        )
    return files


def _load_processor(directory: Path, config: FlorenceVLConfig) -> FlorenceVLProcessor:
    processor = read_processor(directory)
    given = (processor.num_image_tokens, processor.image_token_id)
    expected = (config.num_image_tokens, config.image_token_id)
    if given != expected:
        raise CheckpointError(
            f"The processor in {directory} turns an image into {given[0]} tokens of id {given[1]}, but the model "
            f"expects {expected[0]} of id {expected[1]}; save the processor of this model."
        )
    return processor


__all__ = ["files_to_push", "push"]
