# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Settings of a training run, and recipes: YAML files of such settings."""

import re
from dataclasses import MISSING, Field, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from huggingface_hub.dataclasses import type_validator
from transformers import HfArgumentParser, TrainingArguments

from .collator import OnError
from .stages import STAGES


# The recipes of the package, and the configuration files of accelerate in `accelerate/`.
RECIPES = Path(__file__).parent / "recipes"
# The setting that names the recipe whose settings a recipe starts from.
EXTENDS = "extends"


@dataclass
class ModelArguments:
    """The model, and which of its parameters are trained."""

    model_name_or_path: str = field(
        metadata={"help": "Directory or Hub id of a model, original checkpoints included."}
    )
    stage: str = field(default="finetune", metadata={"help": "Training stage.", "choices": sorted(STAGES)})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Of the weights. `bf16: true` computes in bfloat16 with float32 weights."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "Such as sdpa or flash_attention_2."})
    fusion_strategy: str | None = field(
        default=None, metadata={"help": "For ablations: channel, token or average. By default, as in the model."}
    )
    fusion_features: list[str] | None = field(
        default=None, metadata={"help": "For ablations: the fused features, in order. By default, as in the model."}
    )
    use_peft: bool = field(default=False, metadata={"help": "Train LoRA in place of the language model's weights."})
    lora_r: int = field(default=64, metadata={"help": "Rank of LoRA."})
    lora_alpha: float = field(default=16.0, metadata={"help": "Alpha of LoRA."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout of LoRA."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantize the language model below LoRA to 4 bits."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Quantize the language model below LoRA to 8 bits."})

    def __post_init__(self) -> None:
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("Got both `load_in_4bit` and `load_in_8bit`; choose one.")
        if self.num_bits is not None and not self.use_peft:
            raise ValueError(f"Weights in {self.num_bits} bits cannot be trained; add `use_peft: true`.")
        if self.use_peft and self.fusion_changes:
            raise ValueError(
                "Got another fusion together with `use_peft`: an adapter is loaded onto its base model, which has its "
                "own fusion. Train the projector with this fusion first, then LoRA on top of that model."
            )
        if self.use_peft and self.stage not in ("finetune", "language_model"):
            raise ValueError(
                f"Got `use_peft` with stage {self.stage!r}: LoRA trains the language model, and never the vision "
                f"tower. Choose `finetune` (LoRA and the projector) or `language_model` (LoRA alone)."
            )

    @property
    def fusion_changes(self) -> dict[str, Any]:
        """The fields of `FlorenceVLConfig` that override those of the model."""
        changes = {"fusion_strategy": self.fusion_strategy, "fusion_features": self.fusion_features}
        return {name: value for name, value in changes.items() if value}

    @property
    def num_bits(self) -> int | None:
        """Bits per weight of a quantized language model, or `None`."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else None


@dataclass
class DataArguments:
    """The data of training and evaluation."""

    train_file: str = field(
        metadata={"help": "LLaVA JSON or JSONL, chat JSONL, a directory of `datasets`, or a Hub id with messages."}
    )
    image_folder: str | None = field(
        default=None, metadata={"help": "Directory of relative image paths. By default, that of the file."}
    )
    train_split: str = field(default="train", metadata={"help": "Split of a dataset that has several."})
    eval_file: dict[str, str] | str | None = field(
        default=None, metadata={"help": "As `train_file`; or several by name, each evaluated separately."}
    )
    eval_image_folder: str | None = field(default=None, metadata={"help": "By default, as `image_folder`."})
    eval_split: str = field(default="train", metadata={"help": "As `train_split`."})
    chat_template: str | None = field(
        default=None, metadata={"help": "llama3, phi3, vicuna or plain (captions). By default, the processor's own."}
    )
    do_pad: bool | None = field(
        default=None, metadata={"help": "Pad images to squares before resizing. By default, as in the processor."}
    )
    max_length: int = field(
        default=2048, metadata={"help": "Truncate samples to this many tokens. Image tokens count, and are never cut."}
    )
    on_error: OnError = field(default="skip", metadata={"help": "Skip and count broken samples, or raise an error."})

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise ValueError(f"Got `max_length: {self.max_length}`, expected at least 1.")

    @property
    def eval_files(self) -> dict[str | None, str]:
        """Evaluation sets by name; `None` is the name of a single one."""
        if isinstance(self.eval_file, dict):
            return dict(self.eval_file)
        return {} if self.eval_file is None else {None: self.eval_file}


@dataclass
class FlorenceVLTrainingArguments(TrainingArguments):
    """`TrainingArguments` with learning rates per part of the model, and generated answers in evaluation."""

    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator reads all columns."})
    projector_learning_rate: float | None = field(default=None, metadata={"help": "By default, `learning_rate`."})
    vision_tower_learning_rate: float | None = field(default=None, metadata={"help": "By default, `learning_rate`."})
    predict_with_generate: bool = field(
        default=False, metadata={"help": "Generate and measure answers in evaluation."}
    )
    generation_max_new_tokens: int = field(default=64, metadata={"help": "Maximum length of an answer, in tokens."})
    answer_metric: str = field(
        default="exact_match",
        metadata={
            "help": "exact_match, or the `package.module:function` of a function that takes a list of answers and a "
            "list of references and returns a dict of floats."
        },
    )
    auto_resume: bool = field(
        default=True,
        metadata={"help": "Resume from the last complete checkpoint in `output_dir`. With false, one is an error."},
    )


ARGUMENT_CLASSES = (ModelArguments, DataArguments, FlorenceVLTrainingArguments)
SETTINGS: dict[str, Field] = {
    setting.name: setting for arguments in ARGUMENT_CLASSES for setting in fields(arguments) if setting.init
}
# Not `Field.type`, which `HfArgumentParser` replaces.
TYPES = {name: kind for arguments in ARGUMENT_CLASSES for name, kind in get_type_hints(arguments).items()}
# Renamed in Transformers 5.23. Recipes may use either name.
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in SETTINGS else "gradient_checkpointing"


def find_recipe(name: str | Path, directory: Path = Path()) -> Path:
    """
    Find a recipe by its path, relative to `directory`, or its name in the package, such as `ablations/fusion_token`.
    An existing path takes precedence. Raises a `ValueError` if there is none.
    """
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
    settings = _read_with_parents(find_recipe(recipe), ())
    for override in overrides or []:
        name, separator, value = override.partition("=")
        if not (separator and name.strip()):
            raise ValueError(f"Got the override {override!r}, expected key=value.")
        settings[name.strip()] = _parse_yaml(value, f"the value of {name.strip()}")
    return settings


def _read_with_parents(path: Path, children: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in children:
        raise ValueError(f"{path} extends itself, through {children[-1]}; remove one `{EXTENDS}`.")
    settings = _parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is not a recipe; expected lines such as `learning_rate: 1.0e-5`.")
    parent = settings.pop(EXTENDS, None)
    if parent is None:
        return settings
    if not isinstance(parent, str):
        raise ValueError(f"Got `{EXTENDS}: {parent!r}` in {path}, expected the name or path of one recipe.")
    return _read_with_parents(find_recipe(parent, path.parent), (*children, path.resolve())) | settings


class _RecipeLoader(yaml.SafeLoader):
    """As in YAML 1.2, `no` and `off` are strings, so `save_strategy: no` works, and 1e-5 is a number."""


_RecipeLoader.add_constructor(
    "tag:yaml.org,2002:bool", lambda _, node: {"true": True, "false": False}.get(node.value.lower(), node.value)
)
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _RecipeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not YAML: {error}") from error


def parse_recipe(recipe: dict[str, Any]) -> tuple[ModelArguments, DataArguments, FlorenceVLTrainingArguments]:
    """
    Build the arguments of a run from the settings of a recipe. A setting that is `None` has its default.

    Raises:
        ValueError: If a setting is unknown, missing or of a wrong type, or settings do not fit together.
    """
    settings = {}
    for name, value in recipe.items():
        name = re.sub("^(gradient|activation)_checkpointing", CHECKPOINTING, name)
        if name not in SETTINGS:
            close = get_close_matches(name, SETTINGS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "`florence-vl train --settings` lists them."
            raise ValueError(f"A recipe has no setting {name!r}; {hint}")
        if value is not None:
            settings[name] = _convert(name, value)
    if missing := [name for name, setting in SETTINGS.items() if _is_required(setting) and name not in settings]:
        raise ValueError(f"The recipe lacks {' and '.join(missing)}; add it, in the file or with `--set`.")
    return HfArgumentParser(ARGUMENT_CLASSES).parse_dict(settings)


def _convert(name: str, value: Any) -> Any:
    """Convert a value to the type of a setting where that loses nothing, and refuse any other type or choice."""
    is_union = get_origin(TYPES[name]) in (Union, UnionType)
    kinds = {get_origin(kind) or kind for kind in (get_args(TYPES[name]) if is_union else (TYPES[name],))}
    if isinstance(value, str) and not kinds & {str, Literal}:
        value = _parse_yaml(value, name)  # a number or a boolean in quotes
    if type(value) is int and float in kinds and int not in kinds:
        value = float(value)
    elif type(value) in (int, float) and str in kinds and type(value) not in kinds:
        value = str(value)
    elif list in kinds and str not in kinds and not isinstance(value, list):
        value = [value]
    choices = _choices(name)
    try:
        type_validator(name, value, TYPES[name])
        if choices and value not in choices:
            raise TypeError
    except TypeError as error:
        kind = TYPES[name].__name__ if isinstance(TYPES[name], type) else TYPES[name]
        expected = f"one of {', '.join(map(repr, choices))}" if choices else kind
        raise ValueError(f"Got `{name}: {value!r}`, expected {expected}.") from error
    return value


def _choices(name: str) -> list[str]:
    return SETTINGS[name].metadata.get("choices") or list(
        get_args(TYPES[name]) if get_origin(TYPES[name]) is Literal else ()
    )


def _is_required(setting: Field) -> bool:
    return setting.default is MISSING and setting.default_factory is MISSING


def describe_settings() -> str:
    """List the settings of recipes that `TrainingArguments` does not have, one per line."""
    of_transformers, lines = {setting.name for setting in fields(TrainingArguments)}, []
    for name, setting in SETTINGS.items():
        if name in of_transformers:
            continue
        default = "required" if _is_required(setting) else f"default {setting.default}"
        choices = _choices(name)
        one_of = f" One of {', '.join(choices)}." if choices else ""
        lines.append(f"{name} ({default}): {setting.metadata['help']}{one_of}")
    return "\n".join([*lines, "And all of transformers.TrainingArguments, such as output_dir and learning_rate."])
