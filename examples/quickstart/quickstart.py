# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Train a tiny Florence-VL from scratch on two CPU cores, save it, load it, and ask it about new images."""

from pathlib import Path
from random import Random
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from shapes import IMAGE_SIZE, NUM_IMAGES, describe, draw_samples
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaImageProcessorPil,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from florence_vl_hf import FlorenceVLConfig, FlorenceVLForConditionalGeneration, FlorenceVLProcessor
from florence_vl_hf.modeling.configuration_florence_vl import DEFAULT_PROMPTS
from florence_vl_hf.processing import load_chat_template
from florence_vl_hf.training import FlorenceVLCollator, to_messages


NUM_QUESTIONS = 200
MIN_ACCURACY = 0.95
SYSTEM_MESSAGE = "You are a helpful AI assistant."


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a small byte-level BPE tokenizer on the texts of the dataset."""
    special = ["<pad>", "<s>", "<unk>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<image>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<s>",
        unk_token="<unk>",
        eos_token="<|end|>",
        additional_special_tokens=special[4:],
        padding_side="left",
    )


def build_processor(tokenizer: PreTrainedTokenizerFast, num_image_tokens: int) -> FlorenceVLProcessor:
    """Combine an image processor, the tokenizer and a chat template."""
    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = LlavaImageProcessorPil(
        do_pad=True,
        size=square,
        crop_size=square,
        do_center_crop=False,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    chat_template = load_chat_template("phi3", tokenizer)
    return FlorenceVLProcessor(image_processor, tokenizer, num_image_tokens, chat_template=chat_template)


def build_config(tokenizer: PreTrainedTokenizerFast) -> FlorenceVLConfig:
    """Configure a Florence-VL of about one million parameters."""
    vocabulary = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    davit = {
        "embed_dim": [24, 48, 64, 96],
        "num_heads": [2, 2, 4, 4],
        "num_groups": [2, 2, 4, 4],
        "depths": [1, 1, 1, 1],
        "patch_stride": [4, 2, 1, 2],
        "window_size": 4,
        "projection_dim": 96,
        "drop_path_rate": 0.0,
        # Larger than in a large model: untrained, the tower's features then differ more between images.
        "initializer_range": 0.08,
    }
    bart = {
        "model_type": "bart",
        "d_model": 96,
        "encoder_layers": 1,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 192,
        "decoder_layers": 1,
        "max_position_embeddings": 64,
        "dropout": 0.0,
        "init_std": 0.08,
    }
    llama = {
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.08,
    }
    return FlorenceVLConfig(
        vision_config={"vision_config": davit, "text_config": {**bart, **vocabulary}},
        text_config={**llama, **vocabulary},
        image_size=IMAGE_SIZE,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        prompt_token_ids={name: tokenizer(text).input_ids for name, text in DEFAULT_PROMPTS.items()},
        projector_depth=1,
    )


def train(samples: list[dict[str, Any]], output: Path, seed: int) -> None:
    """Train a model from scratch, and save it with its processor."""
    set_seed(seed)
    texts = [turn["value"].removeprefix("<image>\n") for sample in samples for turn in sample["conversations"]]
    tokenizer = build_tokenizer([*texts, *DEFAULT_PROMPTS.values(), SYSTEM_MESSAGE])
    config = build_config(tokenizer)
    processor = build_processor(tokenizer, config.num_image_tokens)
    model = FlorenceVLForConditionalGeneration(config)
    typer.echo(f"Training {model.num_parameters():,} parameters on {len(samples)} images.")
    arguments = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=16,
        num_train_epochs=1,
        learning_rate=5e-4,
        lr_scheduler_type="cosine",
        warmup_steps=30,
        adam_beta2=0.98,
        logging_steps=100,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        use_cpu=True,
        seed=seed,
    )
    Trainer(
        model=model,
        args=arguments,
        train_dataset=samples,
        data_collator=FlorenceVLCollator(processor),
        processing_class=processor,
    ).train()
    model.save_pretrained(output)
    processor.save_pretrained(output)


@torch.inference_mode()
def answer(directory: Path, samples: list[dict[str, Any]], batch_size: int = 50) -> tuple[list[str], list[str]]:
    """Load the model with the Auto classes and answer the samples' questions. Returns answers and references."""
    processor = AutoProcessor.from_pretrained(directory)
    model = AutoModelForImageTextToText.from_pretrained(directory).eval()
    answers = []
    for start in tqdm(range(0, len(samples), batch_size), desc="Answering questions about new images"):
        inputs = processor.apply_chat_template(
            [to_messages(sample)[:-1] for sample in samples[start : start + batch_size]],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )
        output_ids = model.generate(**inputs, max_new_tokens=32, do_sample=False)
        answers += processor.batch_decode(output_ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers, [sample["conversations"][-1]["value"] for sample in samples]


def main(
    output: Annotated[Path, typer.Option(help="Output directory of the model.")] = Path("quickstart-output"),
    seed: Annotated[int, typer.Option(help="Seed of the images and of the weights.")] = 0,
    num_images: Annotated[int, typer.Option(help="Number of training images.")] = NUM_IMAGES,
) -> None:
    """Draw images, train, save, load, and answer questions about new images."""
    output.mkdir(parents=True, exist_ok=True)
    rng, used = Random(seed), set()
    train(draw_samples(rng, num_images, describe, "training", used), output, seed)

    held_out = draw_samples(rng, NUM_QUESTIONS, describe, "evaluation", used)
    answers, references = answer(output, held_out)
    correct = [given == reference for given, reference in zip(answers, references, strict=True)]
    accuracy = sum(correct) / len(correct)

    example = output / "example.png"
    held_out[0]["image"].resize((4 * IMAGE_SIZE, 4 * IMAGE_SIZE), Image.Resampling.NEAREST).save(example)
    question = held_out[0]["conversations"][0]["value"].removeprefix("<image>\n")
    typer.echo(f"\n{example}\n  {question}\n  {answers[0]}\n")
    typer.echo(f"{accuracy:.1%} of {len(correct)} answers about new images are correct, word for word.")
    typer.echo(f"Chat with the model: florence-vl chat {output} {example}")
    if accuracy < MIN_ACCURACY:
        raise SystemExit(f"Expected at least {MIN_ACCURACY:.0%}; try another --seed, or a larger --num-images.")


if __name__ == "__main__":
    typer.run(main)
