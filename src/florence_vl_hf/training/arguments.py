# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""What a recipe may say, and how a recipe is read."""

import json
import re
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser, TrainingArguments

from .collator import OnError
from .stages import STAGES


# In a recipe: the path of another one, relative to it, whose settings this one changes.
EXTENDS = "extends"


@dataclass
class ModelArguments:
    """Which model is trained, and what of it."""

    model_name_or_path: str = field(
        metadata={"help": "Folder or Hub id of a model: converted, assembled, trained, or an original checkpoint."}
    )
    stage: str = field(default="finetune", metadata={"help": "Which parts are trained.", "choices": sorted(STAGES)})
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Precision of the weights. With `bf16: true` float32 weights are computed with in bfloat16.",
            "choices": ["float32", "bfloat16", "float16"],
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Such as sdpa or flash_attention_2; by default the best that is installed."}
    )
    fusion_strategy: str | None = field(
        default=None, metadata={"help": "For ablations: channel, token or average, instead of the model's own."}
    )
    fusion_features: list[str] | None = field(
        default=None, metadata={"help": "For ablations: what is fused, in order, instead of the model's own."}
    )
    use_peft: bool = field(
        default=False, metadata={"help": "LoRA takes the language model's place among what the stage trains."}
    )
    lora_r: int = field(default=64, metadata={"help": "Rank of LoRA."})
    lora_alpha: float = field(default=16, metadata={"help": "Alpha of LoRA."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout of LoRA."})
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Hold the frozen language model in 4 bits (QLoRA), by bitsandbytes."}
    )
    load_in_8bit: bool = field(
        default=False, metadata={"help": "Hold the frozen language model in 8 bits, by bitsandbytes."}
    )

    def __post_init__(self) -> None:
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("Got both `load_in_4bit` and `load_in_8bit`; choose one.")
        if self.num_bits is not None and not self.use_peft:
            raise ValueError(
                f"Weights in {self.num_bits} bits cannot be trained; add `use_peft: true`, or leave `load_in_"
                f"{self.num_bits}bit` out."
            )
        if self.use_peft and self.fusion_changes:
            raise ValueError(
                "Got another fusion together with `use_peft`: an adapter is loaded onto its base, which would not "
                "know of it. Train the whole projector with this fusion first, then LoRA on top of that model."
            )
        if self.use_peft and "vision_tower" in STAGES[self.stage]:
            raise ValueError(
                f"Stage {self.stage!r} trains the vision tower, which LoRA never touches; with `use_peft` take "
                f"`finetune` (LoRA and the projector) or `language_model` (LoRA alone)."
            )
        if self.use_peft and "language_model" not in STAGES[self.stage]:
            raise ValueError(
                f"Stage {self.stage!r} does not train the language model, so there is nothing for LoRA; leave "
                f"`use_peft` out, or take `finetune` or `language_model`."
            )

    @property
    def fusion_changes(self) -> dict[str, Any]:
        """What a recipe changes about the fusion of the model's configuration."""
        changes = {"fusion_strategy": self.fusion_strategy, "fusion_features": self.fusion_features}
        return {name: value for name, value in changes.items() if value}

    @property
    def num_bits(self) -> int | None:
        """Bits per weight of a quantized language model; `None` for one that is not."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else None


@dataclass
class DataArguments:
    """What is learned from."""

    train_file: str = field(
        metadata={"help": "LLaVA JSON or JSONL, chat JSONL, a folder of `datasets`, or a Hub id with chat messages."}
    )
    image_folder: str | None = field(
        default=None, metadata={"help": "What paths of pictures are relative to; by default the file's own folder."}
    )
    train_split: str = field(default="train", metadata={"help": "Split of a data set that has several."})
    eval_file: dict[str, str] | str | None = field(
        default=None, metadata={"help": "As `train_file`; or several, each under a name, which are measured apart."}
    )
    eval_image_folder: str | None = field(default=None, metadata={"help": "As `image_folder`; by default the same."})
    eval_split: str = field(default="train", metadata={"help": "As `train_split`."})
    chat_template: str | None = field(
        default=None,
        metadata={"help": "llama3, phi3, vicuna or plain (pictures and captions); by default the processor's own."},
    )
    do_pad: bool | None = field(
        default=None,
        metadata={"help": "Whether pictures are padded to a square before they are resized; by default as before."},
    )
    max_length: int = field(
        default=2048, metadata={"help": "Samples are cut here, in tokens with those of pictures; pictures never are."}
    )
    on_error: OnError = field(
        default="skip", metadata={"help": "What a broken sample does: it is left out and counted, or it ends the run."}
    )

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise ValueError(f"Got `max_length: {self.max_length}`, expected at least 1.")
        if isinstance(self.eval_file, str) and self.eval_file.startswith("{"):
            self.eval_file = json.loads(self.eval_file)

    @property
    def eval_files(self) -> dict[str | None, str]:
        """Evaluation sets by name. A single one has none."""
        if self.eval_file is None:
            return {}
        return {None: self.eval_file} if isinstance(self.eval_file, str) else dict(self.eval_file)


@dataclass
class FlorenceVLTrainingArguments(TrainingArguments):
    """Transformers' `TrainingArguments`, with learning rates per part and answers in evaluation."""

    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Columns of the data are what the collator reads: they stay."}
    )
    projector_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the projector; by default `learning_rate`."}
    )
    vision_tower_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the vision tower; by default `learning_rate`."}
    )
    predict_with_generate: bool = field(
        default=False, metadata={"help": "In evaluation, also let the model answer, and measure the answers."}
    )
    generation_max_new_tokens: int = field(
        default=64, metadata={"help": "Length at most of an answer in evaluation, in tokens."}
    )
    answer_metric: str = field(
        default="exact_match",
        metadata={
            "help": "What measures answers: exact_match, or `package.module:function` of yours, which takes lists of "
            "answers and references and returns numbers by name."
        },
    )
    auto_resume: bool = field(
        default=True,
        metadata={
            "help": "Go on from the last complete checkpoint in `output_dir`, if there is one. With false, a folder "
            "that holds any is refused: checkpoints of two runs would replace each other."
        },
    )


ARGUMENT_CLASSES = (ModelArguments, DataArguments, FlorenceVLTrainingArguments)


def read_recipe(path: str | Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """
    Read a recipe, the recipes that it extends, and changes to it.

    Args:
        path (`str` or `Path`): A YAML file of settings. `extends` in it names another one, relative to it.
        overrides (`list[str]`, *optional*): Changes as `key=value`, the value as YAML.

    Raises:
        ValueError: If a file is no recipe, recipes extend one another in a circle, or a change has no `=`.
    """
    recipe = _read_with_parents(Path(path), ())
    for override in overrides or []:
        key, separator, value = override.partition("=")
        if not (separator and key.strip()):
            raise ValueError(f"{override!r} is no change of a setting; give it as key=value.")
        recipe[key.strip()] = _parse_yaml(value, f"the value of --set {key.strip()}")
    return recipe


def _read_with_parents(path: Path, children: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in children:
        raise ValueError(f"{path} extends itself, by way of {children[-1]}; leave one `{EXTENDS}` out.")
    if not path.is_file():
        raise ValueError(f"There is no recipe {path}.")
    recipe = _parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} is no recipe; it should hold lines such as `learning_rate: 1.0e-5`.")
    parent = recipe.pop(EXTENDS, None)
    if parent is None:
        return recipe
    if not isinstance(parent, str):
        raise ValueError(f"`{EXTENDS}` in {path} is {parent!r}, expected the path of one recipe.")
    return _read_with_parents(path.parent / parent, (*children, path.resolve())) | recipe


class _RecipeLoader(yaml.SafeLoader):
    """As in YAML 1.2, `no` and `off` are words, so `save_strategy: no` means what it says, and 1e-5 is a number."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _RecipeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is no YAML: {error}") from error


def describe_settings() -> str:
    """The settings that recipes have beside those of `TrainingArguments`, a line each."""
    of_trainer = {argument.name for argument in fields(TrainingArguments)}
    lines = []
    for arguments in ARGUMENT_CLASSES:
        for argument in fields(arguments):
            if argument.name not in of_trainer:
                default = "needed" if argument.default is MISSING else f"default {argument.default}"
                choices = argument.metadata.get("choices")
                help_text = argument.metadata["help"] + (f" One of {', '.join(choices)}." if choices else "")
                lines.append(f"{argument.name} ({default}): {help_text}")
    lines.append("And all of transformers.TrainingArguments, such as output_dir and learning_rate.")
    return "\n".join(lines)


class _RecipeParser(HfArgumentParser):
    """Reports a wrong value as an error, where a command line would end the program."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse_recipe(recipe: dict[str, Any]) -> tuple[ModelArguments, DataArguments, FlorenceVLTrainingArguments]:
    """
    Turn the settings of a recipe into arguments, each of its right type.

    Raises:
        ValueError: If a setting is unknown, missing or of a wrong type.
    """
    known = {argument.name for arguments in ARGUMENT_CLASSES for argument in fields(arguments) if argument.init}
    for name in recipe:
        if name not in known:
            close = get_close_matches(str(name), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "`florence-vl train --settings` lists them."
            raise ValueError(f"A recipe has no setting {name!r}; {hint}")
    # By way of text, since YAML takes 1e-5 for text and the parser knows every setting's type.
    words: list[str] = []
    for name, value in recipe.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *(json.dumps(item) if isinstance(item, dict) else str(item) for item in values)]
    parser = _RecipeParser(ARGUMENT_CLASSES, prog="recipe")
    return parser.parse_args_into_dataclasses(words, look_for_args_file=False)


__all__ = [
    "DataArguments",
    "FlorenceVLTrainingArguments",
    "ModelArguments",
    "describe_settings",
    "parse_recipe",
    "read_recipe",
]
