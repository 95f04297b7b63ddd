# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Train on pairs of a better and a worse answer, with DPO and LoRA: `python dpo.py MODEL_DIR`."""

import torch
import typer
from datasets import Dataset
from PIL import Image
from trl import DPOConfig, DPOTrainer

from florence_vl_hf.conversion import load_pretrained
from florence_vl_hf.training import lora_config, register_training_hook


COLORS = ("red", "green", "blue", "yellow")


def make_dataset() -> Dataset:
    question = {"role": "user", "content": "Which color is it?"}
    answers = [[{"role": "assistant", "content": f"It is {color}."}] for color in COLORS]
    images = [[Image.new("RGB", (64, 64), color)] for color in COLORS]
    samples = {"prompt": [[question]] * len(COLORS), "chosen": answers, "rejected": answers[1:] + answers[:1]}
    return Dataset.from_dict({**samples, "images": images})


def main(model_dir: str, output: str = "dpo-output", max_steps: int = 20) -> None:
    model, processor = load_pretrained(model_dir, dtype="auto")
    cpu = not torch.cuda.is_available()
    args = DPOConfig(output, max_length=None, learning_rate=1e-4, max_steps=max_steps, use_cpu=cpu)
    lora = lora_config(model, rank=16, alpha=32)
    trainer = DPOTrainer(model, args=args, train_dataset=make_dataset(), processing_class=processor, peft_config=lora)
    register_training_hook(trainer.model)  # without dropout in the frozen vision tower
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    typer.run(main)
