# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""A tiny Florence-VL learns to see, on two CPU cores: draw pictures, train, save, load, and ask about new pictures."""

from pathlib import Path
from random import Random
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from shapes import IMAGE_SIZE, NUM_PICTURES, describe, draw_conversations
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
from florence_vl_hf.training import FlorenceVLCollator


NUM_QUESTIONS = 200
SHARE_WANTED = 0.95
SYSTEM_MESSAGE = "You are a helpful AI assistant."


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Make a small tokenizer from the texts that it will meet."""
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
    """Put an image processor beside the tokenizer, and a conversation format."""
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
    """A Florence-VL of about a million parameters."""
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
        # Wider than a large model's: from nothing, little else tells one picture from another at first.
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
    """Train a model from nothing, and save it with its processor."""
    set_seed(seed)
    texts = [turn["value"].removeprefix("<image>\n") for sample in samples for turn in sample["conversations"]]
    tokenizer = build_tokenizer([*texts, *DEFAULT_PROMPTS.values(), SYSTEM_MESSAGE])
    config = build_config(tokenizer)
    processor = build_processor(tokenizer, config.num_image_tokens)
    model = FlorenceVLForConditionalGeneration(config)
    typer.echo(f"Training {model.num_parameters():,} parameters on {len(samples)} pictures.")
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
def answer(folder: Path, samples: list[dict[str, Any]], batch_size: int = 50) -> tuple[list[str], list[str]]:
    """Load a model as any user would, and let it answer. Returns its answers, and the right ones."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    collator = FlorenceVLCollator(processor)
    answers, right_answers = [], []
    for start in tqdm(range(0, len(samples), batch_size), desc="Asking about new pictures"):
        inputs, references = collator.prompts(samples[start : start + batch_size])
        output_ids = model.generate(**inputs, max_new_tokens=32, do_sample=False)
        answers += processor.batch_decode(output_ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right_answers += references
    return answers, right_answers


def main(
    output: Annotated[Path, typer.Option(help="Folder for the model and a picture.")] = Path("quickstart-output"),
    seed: Annotated[int, typer.Option(help="Of the pictures and of the weights.")] = 0,
    pictures: Annotated[int, typer.Option(help="How many to learn from.")] = NUM_PICTURES,
) -> None:
    """Draw, train, save, load, ask."""
    output.mkdir(parents=True, exist_ok=True)
    rng, seen = Random(seed), set()
    known = draw_conversations(rng, pictures, describe, "learn from", seen)
    train(known, output, seed)

    new = draw_conversations(rng, NUM_QUESTIONS, describe, "be asked about", seen)
    answers, right_answers = answer(output, new)
    right = [given == wanted for given, wanted in zip(answers, right_answers, strict=True)]
    share = sum(right) / len(right)

    shown = new[0]["image"].resize((4 * IMAGE_SIZE, 4 * IMAGE_SIZE), Image.Resampling.NEAREST)
    shown.save(output / "picture.png")
    question = new[0]["conversations"][0]["value"].removeprefix("<image>\n")
    typer.echo(f"\n{output / 'picture.png'}\n  {question}\n  {answers[0]}\n")
    typer.echo(f"{share:.1%} of {len(right)} answers about pictures that it never saw are exactly right.")
    typer.echo(f"Talk to it: florence-vl chat {output} {output / 'picture.png'}")
    if share < SHARE_WANTED:
        raise SystemExit(f"Fewer than {SHARE_WANTED:.0%}: try another --seed, or more --pictures.")


if __name__ == "__main__":
    typer.run(main)
