# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Small inputs of every command, which cases copy and damage."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import get_peft_model
from PIL import Image
from transformers import AutoModelForCausalLM, LlamaConfig

from florence_vl_hf.conversion import convert, load_pretrained
from florence_vl_hf.training import lora_config

from ..conftest import FIXTURES, llava_sample


GOLDEN = FIXTURES / "llama-small"


def write_inputs(directory: Path) -> None:
    """Write an original checkpoint, a converted one, an adapter, parts to assemble, data, a recipe and a reference."""
    shutil.copytree(GOLDEN / "checkpoint", directory / "original")
    shutil.copytree(GOLDEN / "vision_tower", directory / "original" / "vision_tower")
    shutil.copytree(FIXTURES / "phi-small" / "checkpoint", directory / "original-phi")
    convert(directory / "original", directory / "converted")
    model, processor = load_pretrained(directory / "converted")
    model = get_peft_model(model, lora_config(model, rank=2))
    model.save_pretrained(directory / "adapter")

    shutil.copytree(directory / "original-phi" / "vision_tower", directory / "tower")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    llm = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(processor.tokenizer), **sizes))
    llm.save_pretrained(directory / "llm")
    processor.tokenizer.save_pretrained(directory / "llm")

    images = directory / "images"
    images.mkdir()
    for i in range(4):
        Image.new("RGB", (20, 30 + i), (60 * i, 90, 200)).save(images / f"{i}.png")
    samples = [llava_sample(i, [f"{i % 4}.png"]) for i in range(8)]
    (directory / "data.json").write_text(json.dumps(samples))
    (directory / "data.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    recipe: dict[str, Any] = {
        "model_name_or_path": "converted",
        "stage": "projector",
        "train_file": "data.json",
        "image_folder": "images",
        "output_dir": "output",
        "use_cpu": True,
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "save_steps": 1,
        "save_total_limit": 1,
        "learning_rate": 1.0e-3,
        "disable_tqdm": True,
        "report_to": "none",
    }
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    (directory / "reference").mkdir()
    for name in ("reference.json", "reference.safetensors"):
        shutil.copyfile(GOLDEN / name, directory / "reference" / name)
    shutil.copytree(GOLDEN / "images", directory / "reference" / "images")


def check_output(command: str, output: Path) -> None:
    """Load what a command wrote, and answer a question about an image with it."""
    model, processor = load_pretrained(output)
    content = [{"type": "image", "image": Image.new("RGB", (30, 20), "green")}, {"type": "text", "text": "What?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    if model.config.image_size != inputs["pixel_values"].shape[-1]:
        return  # The configuration or the processor was damaged: the model says so when it gets the image.
    with torch.no_grad():
        logits = model(**inputs).logits
    if tuple(logits.shape[:2]) != tuple(inputs["input_ids"].shape):
        raise AssertionError(f"{command} wrote a model whose logits have shape {tuple(logits.shape)}")
