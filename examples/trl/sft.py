# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Train on answers, with LoRA: `python sft.py MODEL_DIR`."""

import torch
import typer
from datasets import Dataset
from PIL import Image
from trl import SFTConfig, SFTTrainer

from florence_vl_hf.conversion import load_pretrained
from florence_vl_hf.training import lora_config, register_training_hook


COLORS = ("red", "green", "blue", "yellow")


def make_dataset() -> Dataset:
    question = {"role": "user", "content": "Which color is it?"}
    answers = [{"role": "assistant", "content": f"It is {color}."} for color in COLORS]
    images = [[Image.new("RGB", (64, 64), color)] for color in COLORS]
    return Dataset.from_dict({"messages": [[question, answer] for answer in answers], "images": images})


def main(model_dir: str, output: str = "sft-output", max_steps: int = 20) -> None:
    model, processor = load_pretrained(model_dir, dtype="auto")
    cpu = not torch.cuda.is_available()
    args = SFTConfig(
        output, max_length=None, assistant_only_loss=True, learning_rate=1e-4, max_steps=max_steps, use_cpu=cpu
    )
    lora = lora_config(model, rank=16, alpha=32)
    trainer = SFTTrainer(model, args=args, train_dataset=make_dataset(), processing_class=processor, peft_config=lora)
    register_training_hook(trainer.model)  # without dropout in the frozen vision tower
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    typer.run(main)
