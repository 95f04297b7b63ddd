# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""The checkpoints that the authors of Florence-VL published: licences, training data and results."""

from __future__ import annotations

import re
from dataclasses import dataclass


VISION_TOWER = "microsoft/Florence-2-large"

PRETRAINING_DATASETS = ("tomg-group-umd/pixelprose", "Lin-Chen/ShareGPT4V")
FINETUNING_DATASETS = (
    "nyu-visionx/Cambrian-10M",
    "Vision-Flan/vision-flan_191-task_1k",
    "Lin-Chen/ShareGPT4V",
    "HuggingFaceM4/Docmatix",
)

# Results of the finetuned 8B and 3B checkpoints in the paper.
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
    """The language model of a published checkpoint. The licence of the weights follows from its licence."""

    hub_id: str
    license: str
    license_name: str


LANGUAGE_MODELS = {
    "8b": LanguageModel("meta-llama/Llama-3.1-8B-Instruct", "llama3.1", "the Llama 3.1 Community License"),
    "3b": LanguageModel("microsoft/Phi-3.5-mini-instruct", "mit", "MIT"),
}


@dataclass(frozen=True)
class PublishedCheckpoint:
    """Facts about one of the authors' checkpoints, `size` 8b or 3b, `stage` pretrain or sft."""

    size: str
    stage: str

    @classmethod
    def of(cls, hub_id: str) -> PublishedCheckpoint | None:
        """Return the checkpoint with this Hub id, `None` if it is not one of the authors'."""
        match = re.fullmatch(r"jiuhai/florence-vl-(8b|3b)-(pretrain|sft)", hub_id)
        return cls(match[1], match[2]) if match else None

    @property
    def language_model(self) -> LanguageModel:
        return LANGUAGE_MODELS[self.size]

    @property
    def datasets(self) -> list[str]:
        """Training data. Finetuning starts from the pretrained checkpoint."""
        finetuning = FINETUNING_DATASETS if self.stage == "sft" else ()
        return list(dict.fromkeys((*PRETRAINING_DATASETS, *finetuning)))

    @property
    def results(self) -> dict[str, float]:
        """Results of this checkpoint in the paper, which has none of pretrained ones."""
        column = tuple(LANGUAGE_MODELS).index(self.size)
        return {name: row[column] for name, row in PUBLISHED_RESULTS.items()} if self.stage == "sft" else {}


__all__ = ["PUBLISHED_RESULTS", "VISION_TOWER", "PublishedCheckpoint"]
