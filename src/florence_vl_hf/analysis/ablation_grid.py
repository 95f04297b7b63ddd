# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""A grid of model variants and seeds: its settings, which are checked before anything is trained."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub.errors import StrictDataclassError

from ..conversion import check_model_type, is_original
from ..conversion.checkpoint_files import read_json
from ..conversion.original_checkpoint import read_settings
from ..evaluation import load_questions
from ..evaluation.evaluate import check_metrics
from ..modeling import FlorenceVLConfig
from ..training.arguments import SETTINGS, DataArguments, parse_recipe


# Of a grid, beside those of a recipe; and of a variant.
GRID_SETTINGS = ("variants", "seeds", "metrics")
VARIANT_SETTINGS = ("fusion_strategy", "fusion_features")
# The name of a single evaluation set.
UNNAMED = "evaluation"


@dataclass(frozen=True)
class Run:
    """One variant, trained with one seed. Its directory gets the model, answers and scores."""

    variant: str
    seed: int
    directory: Path
    recipe: dict[str, Any]
    # What the model depends on, and what the scores depend on beside it.
    settings: dict[str, Any]
    evaluation: dict[str, Any]

    @property
    def settings_file(self) -> Path:
        return self.directory / "settings.json"

    @property
    def scores_file(self) -> Path:
        return self.directory / "scores.json"

    def read_scores(self) -> dict[str, dict[str, float]] | None:
        """Return the scores by evaluation set and metric, or `None` if the run is not finished."""
        finished = read_json(self.scores_file) if self.scores_file.exists() else {}
        return finished["scores"] if finished.get("evaluation") == self.evaluation else None

    def check_settings(self) -> None:
        """Raise a `ValueError` if the directory has a run with other settings."""
        known = read_json(self.settings_file) if self.settings_file.exists() else self.settings
        changed = [name for name in known | self.settings if known.get(name) != self.settings.get(name)]
        if changed:
            changes = "; ".join(f"{name} {known.get(name)}, now {self.settings.get(name)}" for name in changed)
            raise ValueError(
                f"{self.directory} has a run with other settings ({changes}); give another `output_dir`, or remove "
                f"{self.directory} to repeat the run."
            )


@dataclass(frozen=True)
class Grid:
    """Runs, by seed and then by variant, and how they are evaluated: `generation` are arguments of `predict`."""

    output: Path
    runs: list[Run]
    configs: dict[str, FlorenceVLConfig]  # of the variants
    questions: dict[str, datasets.Dataset]  # of the evaluation sets
    metrics: list[str]
    generation: dict[str, Any]


def read_grid(settings: dict[str, Any]) -> Grid:
    """
    Check the settings of a grid.

    Args:
        settings (`dict[str, Any]`): As in `ablate`.

    Raises:
        ValueError: If a setting is unknown, missing or wrong, or settings do not fit together.
    """
    recipe = dict(settings)
    variants, seeds = _check_variants(recipe.pop("variants", None)), recipe.pop("seeds", None)
    metrics = recipe.pop("metrics", None) or ["exact_match"]
    # `parse_recipe` knows several names of checkpointing.
    if unknown := [str(name) for name in recipe if name not in SETTINGS and "checkpointing" not in str(name)]:
        raise ValueError(
            f"A grid has no setting {', '.join(unknown)}; it has {', '.join(GRID_SETTINGS)}, and those of a recipe, "
            f"which `florence-vl train --settings` lists."
        )
    if not (isinstance(seeds, list) and seeds and all(type(n) is int and seeds.count(n) == 1 for n in seeds)):
        raise ValueError(f"Got `seeds: {seeds}`, expected a list of different integers, such as [0, 1, 2].")
    _, data, training = parse_recipe(recipe)
    if training.eval_strategy != "no":
        raise ValueError("Got `eval_strategy`, but the models of a grid are evaluated after training; remove it.")
    sets = {name or UNNAMED: file for name, file in data.eval_files.items()}
    questions = _load_questions(sets, data, metrics)
    generation: dict[str, Any] = {"max_new_tokens": training.generation_max_new_tokens}
    evaluation = {"metrics": metrics, **generation, "sets": {name: _checksum(file) for name, file in sets.items()}}
    generation |= {"batch_size": training.per_device_eval_batch_size, "device": "cpu" if training.use_cpu else "auto"}

    output, runs, configs = Path(str(training.output_dir)), [], {}
    del recipe["eval_file"]
    for seed in seeds:
        model = str(recipe["model_name_or_path"]).replace("{seed}", str(seed))
        content = {"content of the model": _checksum(model), "content of train_file": _checksum(data.train_file)}
        config = _read_config(model)
        for name, changes in variants.items():
            own = recipe | changes | {"model_name_or_path": model, "seed": seed, "output_dir": None}
            known = json.loads(json.dumps(own | content, default=str))
            directory = output / name / f"seed-{seed}"
            own["output_dir"] = str(directory / "model")
            configs[name] = _change(config, name, parse_recipe(own)[0].fusion_changes)
            runs.append(Run(name, seed, directory, own, known, evaluation))
    return Grid(output, runs, configs, questions, metrics, generation)


def _check_variants(variants: Any) -> dict[str, dict[str, Any]]:
    if not (isinstance(variants, dict) and variants and all(isinstance(v, dict | None) for v in variants.values())):
        raise ValueError(
            f"Got `variants: {variants}`, expected lines such as `average: {{fusion_strategy: average}}`."
        )
    for name, changes in variants.items():
        _check_name(name)
        if unknown := [str(setting) for setting in changes or {} if setting not in VARIANT_SETTINGS]:
            known = " and ".join(VARIANT_SETTINGS)
            raise ValueError(f"The variant {name!r} has no setting {', '.join(unknown)}; a variant has {known}.")
    return {str(name): changes or {} for name, changes in variants.items()}


def _check_name(name: Any) -> None:
    """Refuse a name that is not that of a directory."""
    if Path(str(name)).name != str(name) or name == "..":
        raise ValueError(f"Got {name!r} as a name, which a directory gets; expected one without slashes.")


def _read_config(model: str) -> FlorenceVLConfig:
    check_model_type(model)
    return read_settings(model).config if is_original(model) else FlorenceVLConfig.from_pretrained(model)


def _change(config: FlorenceVLConfig, variant: str, changes: dict[str, Any]) -> FlorenceVLConfig:
    try:
        return FlorenceVLConfig.from_dict(config.to_dict() | changes)
    except (StrictDataclassError, ValueError) as error:
        raise ValueError(f"The variant {variant!r} is not possible: {error}") from error


def _load_questions(sets: dict[str, str], data: DataArguments, metrics: list[str]) -> dict[str, datasets.Dataset]:
    if not sets:
        raise ValueError("The grid lacks `eval_file`; add one evaluation set, or several by name.")
    folder, questions = data.eval_image_folder or data.image_folder, {}
    for name, file in sets.items():
        _check_name(name)
        questions[name] = load_questions(file, folder, data.eval_split)
        check_metrics(questions[name], metrics)
    return questions


def _checksum(path: str) -> str | None:
    """Return a checksum of a local file, or of the files in a directory."""
    checksum = hashlib.sha256()
    for file in sorted(file for file in (Path(path), *Path(path).rglob("*")) if file.is_file()):
        with open(file, "rb") as opened:
            checksum.update(hashlib.file_digest(opened, "sha256").digest())
    return checksum.hexdigest() if Path(path).exists() else None


__all__ = ["Grid", "Run", "read_grid"]
