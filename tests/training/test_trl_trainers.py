# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""TRL's trainers of preferences and rewards, and its trainers with the path of a model. test_trl.py tests the data."""

import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer

from florence_vl_hf import FlorenceVLModel, FlorenceVLProcessor
from florence_vl_hf.training import register_training_hook, set_trainable


pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[2] / "examples" / "trl"
LLAMA, PHI = (
    pytest.mark.parametrize("golden", [name], indirect=True, scope="session") for name in ("llama-small", "phi-small")
)
# The colors of the images of each question.
QUESTIONS = {"Red alone?": ["red"], "Red, then blue?": ["red", "blue"], "No image?": [], "Green alone?": ["green"]}
TRAINERS: dict[str, tuple[type[Trainer], type, dict[str, Any]]] = {
    "sft": (SFTTrainer, SFTConfig, {"max_length": None}),
    "dpo": (DPOTrainer, DPOConfig, {"max_length": None}),
    "grpo": (GRPOTrainer, GRPOConfig, {"num_generations": 2, "max_completion_length": 6, "beta": 0.1}),
    "rloo": (RLOOTrainer, RLOOConfig, {"num_generations": 2, "max_completion_length": 6, "beta": 0.1}),
}


def dataset(name: str) -> Dataset:
    samples = []
    for question, colors in QUESTIONS.items():
        sample: dict[str, Any] = {"prompt": [{"role": "user", "content": question}]}
        answers = [[{"role": "assistant", "content": text}] for text in ("It is.", "No, certainly not.")]
        if name == "sft":
            sample["completion"] = answers[0]
        elif name == "dpo":
            sample["chosen"], sample["rejected"] = answers
        samples.append({**sample, "images": [Image.new("RGB", (64, 64), color) for color in colors]})
    return Dataset.from_list(samples)


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(sum(ids) % 7) for ids in completion_ids]


def make_trainer(name: str, model: Any, output: Path, **settings: Any) -> Trainer:
    trainer_class, config_class, of_trainer = TRAINERS[name]
    arguments = config_class(
        output, use_cpu=True, bf16=False, max_steps=3, per_device_train_batch_size=4, learning_rate=3e-3,
        logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True, **of_trainer,
    )  # fmt: skip
    rewards = {"reward_funcs": reward} if name in ("grpo", "rloo") else {}
    return trainer_class(model, args=arguments, train_dataset=dataset(name), **rewards, **settings)


class ImageCheck:
    """Checks the images of each batch: of which samples, in which order, with how many tokens."""

    def __init__(self, model: torch.nn.Module, processor: FlorenceVLProcessor) -> None:
        self.processor, self.num_images = processor, 0
        inner = next(module for module in model.modules() if isinstance(module, FlorenceVLModel))
        inner.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, model: FlorenceVLModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("pixel_values") is None:
            return
        colors = []
        for ids in kwargs["input_ids"]:
            text = self.processor.decode(ids[ids != model.config.image_token_id])
            [of_sample] = [colors for question, colors in QUESTIONS.items() if question in text]
            assert (ids == model.config.image_token_id).sum() == len(of_sample) * model.config.num_image_tokens
            colors += of_sample
        images = [Image.new("RGB", (64, 64), color) for color in colors]
        expected = self.processor.image_processor(images, return_tensors="pt").pixel_values
        torch.testing.assert_close(kwargs["pixel_values"], expected)
        self.num_images += len(images)


def train(trainer: Trainer, name: str, processor: FlorenceVLProcessor) -> None:
    """Train, and check images, losses and which parameters change."""
    images = ImageCheck(trainer.model, processor)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    assert images.num_images > 0
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == 3 and all(math.isfinite(entry["loss"]) for entry in history)
    # Without any dropout, the model is the reference model in the first step.
    if name == "dpo":
        assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
        assert history[-1]["rewards/margins"] > history[0]["rewards/margins"]
    elif name in ("grpo", "rloo"):
        assert history[0]["kl"] == pytest.approx(0, abs=1e-4) and abs(history[-1]["kl"]) > 1e-4
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in trainer.model.named_parameters() if p.requires_grad}


def assert_equal_weights(loaded: torch.nn.Module, trained: torch.nn.Module) -> None:
    expected = trained.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


@LLAMA
@pytest.mark.parametrize("name", ["dpo", "grpo", "rloo"])
def test_model_and_processor(name, converted, processor, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(converted, dtype=torch.float32)
    trainer = make_trainer(name, model, tmp_path, processing_class=processor)
    set_trainable(trainer.model, "finetune")
    train(trainer, name, processor)
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {
        n for n, _ in model.named_parameters() if ".vision_tower." in n
    }
    trainer.save_model()
    assert_equal_weights(AutoModelForImageTextToText.from_pretrained(tmp_path), model)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is FlorenceVLProcessor


@PHI
@pytest.mark.parametrize("name", TRAINERS)
def test_path_and_lora(name, converted, processor, tmp_path):
    lora = LoraConfig(r=8, target_modules=r".*language_model\..*_proj")
    trainer = make_trainer(name, str(converted), tmp_path, peft_config=lora)
    assert type(trainer.processing_class) is FlorenceVLProcessor
    register_training_hook(trainer.model)
    train(trainer, name, processor)
    assert all("language_model" in n and ".lora_" in n for n, p in trainer.model.named_parameters() if p.requires_grad)
    trainer.save_model()
    base = AutoModelForImageTextToText.from_pretrained(converted, dtype=torch.float32)
    assert_equal_weights(PeftModel.from_pretrained(base, tmp_path), trainer.model)


@LLAMA
def test_other_images_change_the_log_probabilities(converted, processor, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(converted, dtype=torch.float32)
    trainer = make_trainer("dpo", model, tmp_path, processing_class=processor)
    samples = dataset("dpo").select([0])
    other = Dataset.from_list([{**samples[0], "images": [Image.new("RGB", (64, 64), "blue")]}])
    found = [trainer.evaluate(samples)["eval_logps/chosen"] for samples in (samples, samples, other)]
    assert found[0] == found[1] != found[2]


@LLAMA
@pytest.mark.parametrize("name", TRAINERS)
def test_example(name, converted, tmp_path):
    runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](str(converted), str(tmp_path), max_steps=2)
    base = AutoModelForImageTextToText.from_pretrained(converted)
    adapter = PeftModel.from_pretrained(base, tmp_path).state_dict()
    assert any(tensor.any() for key, tensor in adapter.items() if "lora_B" in key)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is FlorenceVLProcessor
