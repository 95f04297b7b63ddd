# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Settings of a training run, and recipes: YAML files of such settings."""

import os
import re
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from inspect import Parameter, formatannotation, signature
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub.dataclasses import type_validator
from transformers import HfArgumentParser, TrainingArguments

from .collator import OnError
from .samples import MAX_IMAGE_SIDE
from .stages import Stage


# The recipes of the package, and the configuration files of accelerate in `accelerate/`.
RECIPES = Path(__file__).parent / "recipes"


def setting(help: str, default: Any = MISSING) -> Any:
    """Declare a setting, which is required without a default."""
    return field(default=default, metadata={"help": help})


@dataclass
class ModelArguments:
    """The model, and which of its parameters are trained."""

    model_name_or_path: str = setting("Directory or Hub id of a model, original checkpoints included.")
    stage: Stage = setting("Training stage.", "finetune")
    dtype: Literal["float32", "bfloat16", "float16"] = setting("Of the weights, not of mixed precision.", "float32")
    attn_implementation: str | None = setting("Such as sdpa or flash_attention_2.", None)
    fusion_strategy: str | None = setting("For ablations: channel, token or average. By default, the model's.", None)
    fusion_features: list[str] | None = setting("For ablations: the fused features. By default, the model's.", None)
    use_peft: bool = setting("Train LoRA in place of the language model's weights.", False)
    lora_r: int = setting("Rank of LoRA.", 64)
    lora_alpha: float = setting("Alpha of LoRA.", 16.0)
    lora_dropout: float = setting("Dropout of LoRA.", 0.05)
    load_in_4bit: bool = setting("Quantize the language model below LoRA to 4 bits.", False)
    load_in_8bit: bool = setting("Quantize the language model below LoRA to 8 bits.", False)

    def __post_init__(self) -> None:
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("Got both `load_in_4bit` and `load_in_8bit`; choose one.")
        if self.num_bits is not None and not self.use_peft:
            raise ValueError(f"Weights in {self.num_bits} bits cannot be trained; add `use_peft: true`.")
        if self.use_peft and self.fusion_changes:
            raise ValueError("Got another fusion together with `use_peft`; train the projector with it first.")
        if self.use_peft and self.stage not in ("finetune", "language_model"):
            raise ValueError(
                f"Got `use_peft` with stage {self.stage!r}: LoRA trains the language model, not the vision tower. "
                f"Choose `finetune` (LoRA and the projector) or `language_model` (LoRA alone)."
            )

    @property
    def fusion_changes(self) -> dict[str, Any]:
        """The fields of `FlorenceVLConfig` that override those of the model."""
        return {name: getattr(self, name) for name in ("fusion_strategy", "fusion_features") if getattr(self, name)}

    @property
    def num_bits(self) -> int | None:
        """Bits per weight of a quantized language model, or `None`."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else None


@dataclass
class DataArguments:
    """The data of training and evaluation."""

    train_file: str = setting("LLaVA JSON or JSONL, chat JSONL, a directory of `datasets`, or a Hub id with messages.")
    image_folder: str | None = setting("Directory of relative image paths. By default, that of the file.", None)
    train_split: str = setting("Split of a dataset that has several.", "train")
    eval_file: dict[str, str] | str | None = setting("As `train_file`; or several by name.", None)
    eval_image_folder: str | None = setting("By default, as `image_folder`.", None)
    eval_split: str = setting("As `train_split`.", "train")
    chat_template: str | None = setting("llama3, phi3, vicuna or plain (captions). By default, the model's.", None)
    do_pad: bool | None = setting("Pad images to squares before resizing. By default, as in the processor.", None)
    max_length: int = setting("Truncate samples to this many tokens. Image tokens count, and are never cut.", 2048)
    max_image_side: int = setting("In pixels. An image with a longer side is broken.", MAX_IMAGE_SIDE)
    on_error: OnError = setting("Skip and count broken samples, or raise an error.", "skip")

    def __post_init__(self) -> None:
        for name in ("max_length", "max_image_side"):
            if getattr(self, name) < 1:
                raise ValueError(f"Got `{name}: {getattr(self, name)}`, expected at least 1.")

    @property
    def eval_files(self) -> dict[str | None, str]:
        """Evaluation sets by name; `None` is the name of a single one."""
        return {None: self.eval_file} if isinstance(self.eval_file, str) else dict((self.eval_file or {}).items())

    @property
    def paths(self) -> list[str]:
        """All data, of which some may be Hub ids."""
        folders = (self.image_folder, self.eval_image_folder)
        return [self.train_file, *self.eval_files.values(), *filter(None, folders)]


@dataclass
class FlorenceVLTrainingArguments(TrainingArguments):
    """`TrainingArguments` with learning rates per part of the model, and generated answers in evaluation."""

    remove_unused_columns: bool = setting("The collator reads all columns.", False)
    projector_learning_rate: float | None = setting("By default, `learning_rate`.", None)
    vision_tower_learning_rate: float | None = setting("By default, `learning_rate`.", None)
    predict_with_generate: bool = setting("Generate and measure answers in evaluation.", False)
    generation_max_new_tokens: int = setting("Maximum length of an answer, in tokens.", 64)
    answer_metric: str = setting("exact_match, or package.module:function of answers and references.", "exact_match")
    auto_resume: bool = setting("Resume from the last checkpoint in `output_dir`. With false, one is an error.", True)

    def __post_init__(self) -> None:
        super().__post_init__()
        # Recipes are written for machines with many cores.
        self.dataloader_num_workers = min(self.dataloader_num_workers, num_cores())


def num_cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


ARGUMENT_CLASSES: tuple[Any, ...] = (ModelArguments, DataArguments, FlorenceVLTrainingArguments)
# Not from `fields`, whose types `HfArgumentParser` changes.
SETTINGS: dict[str, Parameter] = {
    name: parameter for arguments in ARGUMENT_CLASSES for name, parameter in signature(arguments).parameters.items()
}
# Renamed in Transformers 5.23. Recipes may use either name.
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in SETTINGS else "gradient_checkpointing"


def find_recipe(name: str | Path, directory: Path = Path()) -> Path:
    """Find a recipe by its path, relative to `directory`, or else by its name in the package."""
    for path in (directory / name, RECIPES / name, RECIPES / f"{name}.yaml"):
        if path.is_file():
            return path
    files = [*RECIPES.glob("*.yaml"), *RECIPES.glob("ablations/*.yaml")]
    names = sorted(file.relative_to(RECIPES).with_suffix("").as_posix() for file in files)
    raise ValueError(f"There is no recipe {name}; give the path of a YAML file, or one of {', '.join(names)}.")


def read_recipe(recipe: str | Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """
    Read a recipe, the recipes that it extends, and overrides of its settings.

    Args:
        recipe (`str` or `Path`): As in `find_recipe`. The setting `extends` is the name or path of another recipe,
            relative to this one, whose settings it overrides.
        overrides (`list[str]`, *optional*): Settings as `key=value`, the value in YAML.

    Raises:
        ValueError: If a file is not a recipe, a recipe extends itself, or an override has no `=`.
    """
    settings: dict[str, Any] = {"extends": recipe}
    paths: list[Path] = []
    while (name := settings.pop("extends", None)) is not None:
        path = find_recipe(str(name), paths[-1].parent if paths else Path())
        if any(path.samefile(extending) for extending in paths):
            raise ValueError(f"{path} extends itself, through {paths[-1]}; remove one `extends`.")
        extended = _parse_yaml(path.read_bytes(), str(path))
        if not isinstance(extended, dict):
            raise ValueError(f"{path} is not a recipe; expected lines such as `learning_rate: 1.0e-5`.")
        settings = extended | settings
        paths.append(path)
    for override in overrides or []:
        name, separator, value = override.partition("=")
        if not (separator and name.strip()):
            raise ValueError(f"Got the override {override!r}, expected key=value.")
        settings[name.strip()] = _parse_yaml(value, f"the value of {name.strip()}")
    return settings


class _RecipeLoader(yaml.SafeLoader):
    """As in YAML 1.2, `no` and `off` are strings, so `save_strategy: no` works, and 1e-5 is a number."""


_RecipeLoader.add_constructor(
    "tag:yaml.org,2002:bool", lambda _, node: {"true": True, "false": False}.get(node.value.lower(), node.value)
)
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse_yaml(text: str | bytes, source: str) -> Any:
    try:
        return yaml.load(text, _RecipeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{source} is not YAML ({error}); correct it.") from error


def parse_recipe(recipe: dict[str, Any]) -> tuple[ModelArguments, DataArguments, FlorenceVLTrainingArguments]:
    """
    Build the arguments of a run from the settings of a recipe. A setting that is `None` has its default.

    Raises:
        ValueError: If a setting is unknown, missing or of a wrong type, or settings do not fit together.
    """
    settings = {}
    for name, value in recipe.items():
        name = re.sub("^(gradient|activation)_checkpointing", CHECKPOINTING, str(name))
        if name not in SETTINGS:
            close = get_close_matches(name, SETTINGS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "`florence-vl train --settings` lists them."
            raise ValueError(f"A recipe has no setting {name!r}; {hint}")
        if value is not None:
            settings[name] = _convert(name, value)
    required = {name for name, parameter in SETTINGS.items() if parameter.default is Parameter.empty}
    if missing := sorted(required - set(settings)):
        raise ValueError(f"The recipe lacks {' and '.join(missing)}; add it, in the file or with `--set`.")
    model, data, training = HfArgumentParser(ARGUMENT_CLASSES).parse_dict(settings)
    return model, data, training


def _convert(name: str, value: Any) -> Any:
    """Convert a value to the type of a setting where that loses nothing, and refuse any other."""
    expected = SETTINGS[name].annotation
    # A number or a boolean may be in quotes.
    parsed = _parse_yaml(value, name) if isinstance(value, str) else value
    of_number = [float(parsed), str(parsed)] if type(parsed) in (int, float) else []
    for candidate in (value, parsed, *of_number, [value]):
        with suppress(TypeError):
            type_validator(name, candidate, expected)
            return candidate
    raise ValueError(f"Got `{name}: {value!r}`, expected {formatannotation(expected)}.")


def describe_settings() -> str:
    """List the settings of recipes that `TrainingArguments` does not have, with their types and defaults."""
    of_transformers = signature(TrainingArguments).parameters
    lines = [
        f"{SETTINGS[setting.name]}\n    {setting.metadata['help']}"
        for arguments in ARGUMENT_CLASSES
        for setting in fields(arguments)
        if setting.init and setting.name not in of_transformers
    ]
    return "\n".join([*lines, "And all of transformers.TrainingArguments, such as output_dir and learning_rate."])
