# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Train on a reward of sampled answers, with GRPO and LoRA: `python grpo.py MODEL_DIR`."""

import torch
import typer
from datasets import Dataset
from PIL import Image
from trl import GRPOConfig, GRPOTrainer

from florence_vl_hf.conversion import load_pretrained
from florence_vl_hf.training import lora_config, register_training_hook


COLORS = ("red", "green", "blue", "yellow")


def make_dataset() -> Dataset:
    question = {"role": "user", "content": "Which color is it?"}
    images = [[Image.new("RGB", (64, 64), color)] for color in COLORS]
    return Dataset.from_dict({"prompt": [[question]] * len(COLORS), "images": images, "color": COLORS})


def reward(completions: list[list[dict[str, str]]], color: list[str], **_: object) -> list[float]:
    """Return 1 for naming the color, less 0.01 per character."""
    answers = [completion[0]["content"] for completion in completions]
    return [(name in answer) - 0.01 * len(answer) for answer, name in zip(answers, color, strict=True)]


def main(model_dir: str, output: str = "grpo-output", max_steps: int = 20) -> None:
    model, processor = load_pretrained(model_dir, dtype="auto")
    cpu = not torch.cuda.is_available()
    args = GRPOConfig(
        output, num_generations=4, max_completion_length=32, learning_rate=1e-4, max_steps=max_steps, use_cpu=cpu
    )
    lora = lora_config(model, rank=16, alpha=32)
    trainer = GRPOTrainer(
        model, reward, args=args, train_dataset=make_dataset(), processing_class=processor, peft_config=lora
    )
    register_training_hook(trainer.model)  # without dropout in the frozen vision tower
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    typer.run(main)
