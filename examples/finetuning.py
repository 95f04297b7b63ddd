# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Train LoRA on your own images: `python finetuning.py MODEL SAMPLES`, a CSV file of image, question and answer."""

import csv
from pathlib import Path
from typing import Annotated

import torch
import typer
from peft import get_peft_model

from florence_vl_hf.conversion import load_pretrained
from florence_vl_hf.serving import ChatSession
from florence_vl_hf.training import FlorenceVLCollator, FlorenceVLTrainer, FlorenceVLTrainingArguments, lora_config


def main(
    model: Annotated[str, typer.Argument(help="Directory or Hub id, such as jiuhai/florence-vl-8b-sft.")],
    samples: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Image paths are relative to it.")],
    output: Annotated[Path, typer.Option(help="Output directory of the adapter.")] = Path("finetuned"),
    held_out: Annotated[int, typer.Option(help="Number of samples, the last ones, to evaluate on.", min=1)] = 10,
    epochs: float = 3,
    batch_size: int = 4,
    learning_rate: float = 2e-4,
) -> None:
    with samples.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    if len(rows) <= held_out or rows[0].keys() != {"image", "question", "answer"}:
        raise typer.BadParameter(f"{samples} needs more than {held_out} rows, of image, question and answer.")
    data = [
        {
            "images": [str(samples.parent / row["image"])],
            "messages": [
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": row["answer"]},
            ],
        }
        for row in rows
    ]
    network, processor = load_pretrained(model, dtype="auto")
    is_cuda = torch.cuda.is_available()
    arguments = FlorenceVLTrainingArguments(
        str(output), num_train_epochs=epochs, per_device_train_batch_size=batch_size, learning_rate=learning_rate,
        eval_strategy="epoch", eval_on_start=True, predict_with_generate=True, save_strategy="no",
        logging_steps=10, report_to="none", bf16=is_cuda, use_cpu=not is_cuda,
    )  # fmt: skip
    trainer = FlorenceVLTrainer(
        # The vision tower and the projector stay as they are; `train_projector=True` would train the projector.
        get_peft_model(network, lora_config(network, rank=32, alpha=64)),
        arguments,
        FlorenceVLCollator(processor, max_length=2048, on_error="raise"),
        train_dataset=data[:-held_out],
        eval_dataset=data[-held_out:],
    )
    trainer.train()  # logs `eval_exact_match`, the share of held-out answers that equal those of the file
    trainer.save_model()

    # The adapter's layers are part of `network`; `load_pretrained(output)` loads both again.
    network.generation_config.max_new_tokens = 64
    answer = ChatSession(network.eval(), processor, data[-1]["images"]).answer(rows[-1]["question"])
    typer.echo(f"{rows[-1]['image']}: {rows[-1]['question']}\nExpected: {rows[-1]['answer']}\nAnswer: {answer}")


if __name__ == "__main__":
    typer.run(main)
