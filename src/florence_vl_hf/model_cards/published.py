# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""The checkpoints that the authors of Florence-VL published: licences, training data and results."""

from dataclasses import dataclass, field


PRETRAINING_DATASETS = ["tomg-group-umd/pixelprose", "Lin-Chen/ShareGPT4V"]
# Beside those of pretraining.
FINETUNING_DATASETS = ["nyu-visionx/Cambrian-10M", "Vision-Flan/vision-flan_191-task_1k", "HuggingFaceM4/Docmatix"]

# Results of the finetuned 8B and 3B checkpoints in the paper.
# fmt: off
PUBLISHED_RESULTS = {
    "VQAv2": (84.7, 82.1), "GQA": (64.4, 61.8), "MMBench-EN": (76.2, 71.6), "MMBench-CN": (69.5, 60.8),
    "VizWiz": (59.1, 59.1), "POPE": (89.9, 88.3), "MM-Vet": (56.3, 51.0), "MME-P": (1560.0, 1498.7),
    "MME-C": (381.1, 403.9), "SEED-image": (74.9, 70.6), "HallusionBench": (57.3, 58.1), "LLaVA-Bench": (74.2, 71.1),
    "MMStar": (50.0, 44.9), "RealWorldQA": (64.2, 60.4), "CV-Bench": (73.4, 70.2), "MMVP": (73.3, 64.7),
    "AI2D": (74.2, 73.8), "MathVista": (55.5, 52.2), "MMMU": (43.7, 41.8), "SciQA-IMG": (85.9, 84.6),
    "TextVQA": (74.2, 69.1), "OCRBench": (63.4, 63.0), "ChartQA": (74.7, 70.7), "DocVQA": (84.9, 82.1),
    "InfoVQA": (51.7, 51.3),
}
# fmt: on


@dataclass(frozen=True)
class PublishedCheckpoint:
    """Facts about one of the authors' checkpoints, with the licence of its language model."""

    language_model: str
    license: str
    datasets: list[str]
    results: dict[str, float] = field(default_factory=dict)  # of finetuned checkpoints only
    vision_tower: str = "microsoft/Florence-2-large"


def _finetuned(language_model: str, license: str, column: int) -> PublishedCheckpoint:
    results = {benchmark: row[column] for benchmark, row in PUBLISHED_RESULTS.items()}
    return PublishedCheckpoint(language_model, license, PRETRAINING_DATASETS + FINETUNING_DATASETS, results)


LLAMA = ("meta-llama/Llama-3.1-8B-Instruct", "llama3.1")
PHI = ("microsoft/Phi-3.5-mini-instruct", "mit")

PUBLISHED_CHECKPOINTS = {
    "jiuhai/florence-vl-8b-pretrain": PublishedCheckpoint(*LLAMA, PRETRAINING_DATASETS),
    "jiuhai/florence-vl-8b-sft": _finetuned(*LLAMA, column=0),
    "jiuhai/florence-vl-3b-pretrain": PublishedCheckpoint(*PHI, PRETRAINING_DATASETS),
    "jiuhai/florence-vl-3b-sft": _finetuned(*PHI, column=1),
}
