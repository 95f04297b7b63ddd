# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""The model card of a converted checkpoint. It claims what is known of a published one, and nothing of any other."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCardData

from ..model_cards import write_card
from .original_checkpoint import ConvertedCheckpoint
from .original_config import describe_assumption


VISION_TOWER = "microsoft/Florence-2-large"

CAPTIONS = ("tomg-group-umd/pixelprose", "Lin-Chen/ShareGPT4V")
INSTRUCTIONS = (
    "nyu-visionx/Cambrian-10M",
    "Vision-Flan/vision-flan_191-task_1k",
    "Lin-Chen/ShareGPT4V",
    "HuggingFaceM4/Docmatix",
)
# What a published checkpoint was trained on: finetuning started from what pretraining gave.
DATASETS = {"pretrain": CAPTIONS, "sft": tuple(dict.fromkeys(CAPTIONS + INSTRUCTIONS))}

# Of the finetuned 8B and 3B, as the paper gives them.
PUBLISHED_RESULTS = {
    "VQAv2": (84.7, 82.1),
    "GQA": (64.4, 61.8),
    "MMBench-EN": (76.2, 71.6),
    "MMBench-CN": (69.5, 60.8),
    "VizWiz": (59.1, 59.1),
    "POPE": (89.9, 88.3),
    "MM-Vet": (56.3, 51.0),
    "MME-P": (1560.0, 1498.7),
    "MME-C": (381.1, 403.9),
    "SEED-image": (74.9, 70.6),
    "HallusionBench": (57.3, 58.1),
    "LLaVA-Bench": (74.2, 71.1),
    "MMStar": (50.0, 44.9),
    "RealWorldQA": (64.2, 60.4),
    "CV-Bench": (73.4, 70.2),
    "MMVP": (73.3, 64.7),
    "AI2D": (74.2, 73.8),
    "MathVista": (55.5, 52.2),
    "MMMU": (43.7, 41.8),
    "SciQA-IMG": (85.9, 84.6),
    "TextVQA": (74.2, 69.1),
    "OCRBench": (63.4, 63.0),
    "ChartQA": (74.7, 70.7),
    "DocVQA": (84.9, 82.1),
    "InfoVQA": (51.7, 51.3),
}


@dataclass(frozen=True)
class LanguageModel:
    """The base of a published checkpoint, whose licence its weights follow."""

    hub_id: str
    license: str
    license_name: str


LANGUAGE_MODELS = {
    "8b": LanguageModel("meta-llama/Llama-3.1-8B-Instruct", "llama3.1", "the Llama 3.1 Community License"),
    "3b": LanguageModel("microsoft/Phi-3.5-mini-instruct", "mit", "MIT"),
}


@dataclass(frozen=True)
class PublishedCheckpoint:
    """What is known of a checkpoint by its id on the Hub."""

    size: str
    stage: str

    @classmethod
    def of(cls, hub_id: str) -> PublishedCheckpoint | None:
        """The checkpoint of this id, if it is one of the authors'."""
        match = re.fullmatch(r"jiuhai/florence-vl-(8b|3b)-(pretrain|sft)", hub_id)
        return match and cls(*match.groups())

    @property
    def language_model(self) -> LanguageModel:
        return LANGUAGE_MODELS[self.size]

    @property
    def results(self) -> dict[str, float]:
        """The paper's results of this very checkpoint."""
        column = tuple(LANGUAGE_MODELS).index(self.size)
        return {name: of[column] for name, of in PUBLISHED_RESULTS.items()} if self.stage == "sft" else {}


def hub_id_of(source: str | Path) -> str | None:
    """The id if `source` is on the Hub, `None` if it is a folder here."""
    return None if Path(source).is_dir() else str(source)


def verify_commands(source: str | Path, output: str | Path) -> list[str]:
    """The commands that compare a converted checkpoint with what the original code computes from the original."""
    return [
        f"python tools/record_reference.py --checkpoint {source} --images PICTURES --output reference.safetensors",
        f"florence-vl verify {output} --reference reference.safetensors",
    ]


def write_model_card(
    folder: Path,
    plan: ConvertedCheckpoint,
    source: str | Path,
    name: str,
    read_from: dict[Path, str | Path],
    base: str | Path | None = None,
) -> None:
    """
    Write the `README.md` of a converted checkpoint.

    Args:
        folder (`Path`): Folder of the converted checkpoint.
        plan (`ConvertedCheckpoint`): What was written there.
        source (`str` or `Path`): Folder or Hub id of the original.
        name (`str`): What to call the converted checkpoint.
        read_from (`dict[Path, str | Path]`): The folders that the plan's assumptions name, and the folder or Hub id
            that each stands for: a card does not tell what the disk of its maker looks like.
        base (`str` or `Path`, *optional*): Folder or Hub id of what `source` was put onto, if it is an adapter.
    """
    hub_id = hub_id_of(source)
    published = PublishedCheckpoint.of(hub_id) if hub_id and base is None else None
    assumptions = [describe_assumption(assumption) for assumption in plan.assumptions]
    for place, stands_for in read_from.items():
        assumptions = [assumed.replace(str(place), _public_name(stands_for)) for assumed in assumptions]
    write_card(
        folder,
        "converted.md.jinja",
        _metadata(published),
        name=name,
        hub_id=hub_id,
        base_name=base and _public_name(base),
        published=published,
        vision_tower=VISION_TOWER,
        plan=plan,
        cast_to=plan.cast_to and str(plan.cast_to).removeprefix("torch."),
        num_added_rows=plan.num_added_rows,
        assumptions=assumptions,
        verify_commands=verify_commands(hub_id or "ORIGINAL", name),
    )


def _public_name(folder_or_id: str | Path) -> str:
    return hub_id_of(folder_or_id) or Path(folder_or_id).name


def _metadata(published: PublishedCheckpoint | None) -> ModelCardData:
    known = {}
    if published is not None:
        known = {
            "license": published.language_model.license,
            "base_model": [published.language_model.hub_id, VISION_TOWER],
            "datasets": list(DATASETS[published.stage]),
        }
    return ModelCardData(
        pipeline_tag="image-text-to-text", library_name="transformers", tags=["florence-vl", "florence2"], **known
    )


__all__ = ["PUBLISHED_RESULTS", "PublishedCheckpoint", "hub_id_of", "verify_commands", "write_model_card"]
