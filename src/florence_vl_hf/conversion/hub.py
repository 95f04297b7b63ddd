# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""The way of a complete model to the Hub, and of nothing else."""

import glob
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.utils import validate_repo_id

from ..model_cards import CARD_FILE
from ..modeling import FlorenceVLConfig
from ..processing import FlorenceVLProcessor
from .checkpoint_files import CheckpointError, read_json, read_tensors
from .original_checkpoint import tensor_shapes
from .original_processor import TOKENIZER_FILES
from .remote_code import AUTO_MAPS, auto_map, remote_modules


# What belongs to a model beside its weights, its code and its card. All else stays at home: states of an optimizer,
# logs, hidden files.
KNOWN_FILES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    *TOKENIZER_FILES,
    "LICENSE*",
    "NOTICE*",
)
WEIGHTS_INDEX = "model.safetensors.index.json"


def files_to_push(folder: Path) -> dict[str, int]:
    """
    Check that a folder holds a complete model that loads anywhere, and list what belongs to it.

    Returns:
        `dict[str, int]`: The path of each file within the folder, and its size in bytes.

    Raises:
        CheckpointError: If a file is missing or damaged, or files do not fit each other.
    """
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type != FlorenceVLConfig.model_type:
        raise CheckpointError(
            f"{folder} has model type {model_type!r}, expected {FlorenceVLConfig.model_type!r}; convert it first."
        )
    config = FlorenceVLConfig.from_pretrained(folder)
    _check_processor(folder, config)
    files = {CARD_FILE, *_weight_files(folder, config), *_code_files(folder)}
    _check_card(folder)
    found = (path for pattern in KNOWN_FILES for path in folder.glob(pattern) if path.is_file())
    files |= {path.relative_to(folder).as_posix() for path in found}
    return {name: (folder / name).stat().st_size for name in sorted(files)}


def _check_processor(folder: Path, config: FlorenceVLConfig) -> None:
    read_json(folder / "processor_config.json")
    try:
        processor = FlorenceVLProcessor.from_pretrained(folder)
    except Exception as error:
        # Tokenizers and image processors fail in many ways.
        raise CheckpointError(f"The processor in {folder} cannot be loaded ({error}); save it there again.") from error
    made = (processor.num_image_tokens, processor.image_token_id)
    wanted = (config.num_image_tokens, config.image_token_id)
    if made != wanted:
        raise CheckpointError(
            f"The processor in {folder} turns an image into {made[0]} tokens of id {made[1]}, but the model expects "
            f"{wanted[0]} of id {wanted[1]}; save the processor that belongs to the model."
        )


def _weight_files(folder: Path, config: FlorenceVLConfig) -> set[str]:
    stored = read_tensors(folder)
    files = {tensor.file.name for tensor in stored.values()}
    if not files or any(Path(file).suffix != ".safetensors" for file in files):
        raise CheckpointError(
            f"{folder} holds no model.safetensors, whole or in shards; save the model there with `save_pretrained`."
        )
    missing = set(tensor_shapes(config)) - set(stored) - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    if missing:
        raise CheckpointError(
            f"The weights in {folder} lack {len(missing)} tensors of the model, such as {min(missing)}; save it again."
        )
    return files | ({WEIGHTS_INDEX} if (folder / WEIGHTS_INDEX).is_file() else set())


def _code_files(folder: Path) -> set[str]:
    modules = {module.name for module in remote_modules()}
    without = [name for name in modules if not (folder / name).is_file()]
    without += [name for name in AUTO_MAPS if read_json(folder / name).get("auto_map") != auto_map(name)]
    if without:
        raise CheckpointError(
            f"{folder} does not load where this package is not installed, for want of code or `auto_map`: "
            f"{', '.join(sorted(without))}. Add them with "
            f"`from florence_vl_hf.conversion import write_remote_code; write_remote_code({str(folder)!r})`."
        )
    return modules


def _check_card(folder: Path) -> None:
    path = folder / CARD_FILE
    try:
        metadata = ModelCard(path.read_text(encoding="utf-8")).data.to_dict() if path.is_file() else {}
    except Exception as error:
        # Errors of YAML, of the encoding, or of the card.
        raise CheckpointError(f"{path} has metadata that cannot be read ({error}); correct them.") from error
    if not metadata:
        raise CheckpointError(
            f"{folder} has no {CARD_FILE} with metadata; write a model card that says what the model is, what it was "
            f"trained on, and its licence."
        )


def push(folder: str | Path, repo_id: str, private: bool = False, dry_run: bool = False) -> dict[str, int]:
    """
    Upload a converted or trained model.

    Args:
        folder (`str` or `Path`): Where the model lies.
        repo_id (`str`): `user/name` on the Hub. The repository is made if there is none.
        private (`bool`, *optional*, defaults to `False`): Whether only its owner sees the repository.
        dry_run (`bool`, *optional*, defaults to `False`): Whether to check everything but send nothing.

    Returns:
        `dict[str, int]`: The files that were sent, and their sizes in bytes.

    Raises:
        CheckpointError: If the model is not complete. Nothing is sent then.
        ValueError: If `repo_id` is none, nobody is logged in, or a private model would become public.
    """
    folder = Path(folder)
    validate_repo_id(repo_id)
    if repo_id.count("/") != 1:
        raise ValueError(f"{repo_id!r} is no id of a repository; give it as user/name.")
    files = files_to_push(folder)
    if dry_run:
        return files
    if get_token() is None:
        raise ValueError("Nobody is logged in to the Hub; run `hf auth login`, or set HF_TOKEN.")
    api = HfApi(library_name="florence_vl_hf")
    api.create_repo(repo_id, private=private, exist_ok=True)
    # Of a repository that existed, `create_repo` changes nothing.
    if private and not api.model_info(repo_id).private:
        raise ValueError(f"{repo_id} exists and is public; make it private first, or push without --private.")
    api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=[glob.escape(name) for name in files],
        commit_message="Upload Florence-VL",
    )
    return files


__all__ = ["files_to_push", "push"]
