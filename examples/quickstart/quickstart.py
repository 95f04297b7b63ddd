# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""A tiny Florence-VL from nothing, on two CPU cores: draw pictures, train, save, load, and ask about new pictures."""

import logging
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from shapes import QUESTION_TYPES, draw, random_scene
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
from florence_vl_hf.processing.chat_templates import load_chat_template


IMAGE_SIZE = 64
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SPECIAL_TOKENS = {
    "unk_token": "<unk>",
    "bos_token": "<s>",
    "eos_token": "<|end|>",
    "pad_token": "<pad>",
    "additional_special_tokens": ["<image>", "<|system|>", "<|user|>", "<|assistant|>"],
}
TRAINED_QUESTION_TYPES = ("describe", "colour", "kind")
NUM_TEST_QUESTIONS = 200
SHARE_WANTED = 0.95


@dataclass(frozen=True)
class Example:
    picture: Image.Image
    question: str
    answer: str

    def messages(self, with_answer: bool) -> list[dict[str, Any]]:
        content = [{"type": "image", "image": self.picture}, {"type": "text", "text": self.question}]
        messages = [{"role": "user", "content": content}]
        if with_answer:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": self.answer}]})
        return messages


def make_examples(rng, num_pictures, per_picture=None, unlike=frozenset(), desc="drawing"):
    examples = []
    for i in tqdm(range(num_pictures), desc=desc):
        scene = random_scene(rng)
        picture = draw(scene, IMAGE_SIZE)
        if picture.tobytes() in unlike: continue
        names = TRAINED_QUESTION_TYPES if per_picture is None else [TRAINED_QUESTION_TYPES[i % 3]]
        for n in names:
            q = QUESTION_TYPES[n](scene, rng)
            examples.append(Example(picture, q.text, q.answer))
    return examples


def make_tokenizer(texts):
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    specials = [t for v in SPECIAL_TOKENS.values() for t in (v if isinstance(v, list) else [v])]
    tok.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1000, min_frequency=1, special_tokens=specials, show_progress=False,
                              initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=tok, padding_side="left", **SPECIAL_TOKENS)


def make_config(tokenizer, a):
    V = len(tokenizer)
    D = a.vdim
    return FlorenceVLConfig(
        vision_config={
            "vision_config": dict(embed_dim=a.embed, depths=[1,1,1,1], num_heads=[2,2,4,4], num_groups=[2,2,4,4],
                patch_stride=[4,2,2,1], window_size=4, drop_path_rate=0.0, mlp_ratio=a.mlp, projection_dim=D, initializer_range=a.init),
            "text_config": dict(model_type="bart", vocab_size=V, d_model=D, encoder_layers=1, encoder_attention_heads=4,
                encoder_ffn_dim=2*D, decoder_layers=1, max_position_embeddings=64, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
                pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, init_std=a.init),
        },
        text_config=dict(model_type="llama", vocab_size=V, hidden_size=a.hidden, intermediate_size=2*a.hidden, num_hidden_layers=a.layers,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256, initializer_range=a.init, tie_word_embeddings=a.tie,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_size=IMAGE_SIZE,
        prompt_token_ids={n: tokenizer(t).input_ids for n, t in DEFAULT_PROMPTS.items()},
    )

def make_processor(tokenizer, config):
    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    ip = LlavaImageProcessorPil(do_pad=True, do_center_crop=False, size=square, crop_size=square, image_mean=IMAGE_MEAN, image_std=IMAGE_STD)
    return FlorenceVLProcessor(ip, tokenizer, num_image_tokens=config.num_image_tokens, chat_template=load_chat_template("phi3", tokenizer))


class Collator:
    def __init__(self, processor): self.processor = processor
    def __call__(self, examples):
        batch = self.processor.apply_chat_template([e.messages(True) for e in examples], tokenize=True, return_dict=True,
            return_tensors="pt", padding=True, return_assistant_tokens_mask=True)
        mask = batch.pop("assistant_masks")
        if not torch.is_tensor(mask): mask = torch.tensor(mask)
        batch["labels"] = batch["input_ids"].masked_fill(mask == 0, -100)
        return batch

@torch.no_grad()
def answers(model, processor, examples, bs=50):
    out = []
    for i in tqdm(range(0, len(examples), bs), desc="asking"):
        inp = processor.apply_chat_template([e.messages(False) for e in examples[i:i+bs]], tokenize=True, return_dict=True,
            return_tensors="pt", padding=True, add_generation_prompt=True)
        gen = model.generate(**inp, max_new_tokens=24, do_sample=False)
        out += processor.batch_decode(gen[:, inp["input_ids"].shape[1]:], skip_special_tokens=True)
    return out

if __name__ == "__main__":
    import argparse, time
    p = argparse.ArgumentParser()
    p.add_argument("--seed", type=int, default=0); p.add_argument("--num", type=int, default=4000); p.add_argument("--epochs", type=float, default=1)
    p.add_argument("--bs", type=int, default=32); p.add_argument("--lr", type=float, default=2e-3); p.add_argument("--init", type=float, default=0.02)
    p.add_argument("--hidden", type=int, default=128); p.add_argument("--layers", type=int, default=2); p.add_argument("--vdim", type=int, default=96)
    p.add_argument("--embed", type=int, nargs=4, default=[24,48,64,96]); p.add_argument("--mlp", type=float, default=4.0)
    p.add_argument("--tie", action="store_true"); p.add_argument("--b2", type=float, default=0.98)
    a = p.parse_args()
    t0 = time.time()
    set_seed(a.seed)
    rng = Random(a.seed)
    train = make_examples(rng, a.num)
    test = make_examples(rng, 200, 1)
    tok = make_tokenizer([t for e in train for t in (e.question, e.answer)] + list(DEFAULT_PROMPTS.values()) + ["You are a helpful AI assistant."])
    config = make_config(tok, a); proc = make_processor(tok, config)
    model = FlorenceVLForConditionalGeneration(config)
    print("vocab", len(tok), "params", model.num_parameters(), {n: sum(p.numel() for p in m.parameters()) for n,m in model.model.named_children()}, "img tokens", config.num_image_tokens)
    c = Collator(proc); t=time.time(); b = c(train[:96]); print("collate ms/sample", (time.time()-t)/96*1e3, b["input_ids"].shape, b["labels"][0].tolist())
    print(repr(tok.decode(b["input_ids"][0]))); print([tok.decode([i]) for i in b["input_ids"][0]])
    args = TrainingArguments(output_dir="/tmp/w/qs", use_cpu=True, per_device_train_batch_size=a.bs, learning_rate=a.lr, num_train_epochs=a.epochs,
        lr_scheduler_type="cosine", warmup_steps=50, remove_unused_columns=False, report_to="none", save_strategy="no", logging_steps=50, weight_decay=0.01,
        adam_beta2=a.b2, seed=a.seed)
    trainer = Trainer(model=model, args=args, processing_class=proc, data_collator=c, train_dataset=train)
    t = time.time(); trainer.train(); print("train", time.time()-t)
    model.eval(); t=time.time()
    ans = answers(model, proc, test)
    right = [x == e.answer for x, e in zip(ans, test)]
    print("share", sum(right)/200, [sum(right[i::3])/len(right[i::3]) for i in range(3)], "gen", time.time()-t, "total", time.time()-t0)
    print([(x, e.answer) for x, e in zip(ans, test) if x != e.answer][:10])
