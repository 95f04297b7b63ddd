# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Save tiny models, requests, and what `generate` answers to them."""

import json
import shutil
from typing import Any

import torch

from florence_vl_hf import FlorenceVLConfig, FlorenceVLForConditionalGeneration, FlorenceVLProcessor
from florence_vl_hf.conversion import load_original

from . import FIXTURES, MODELS, NUM_TOKENS


# vLLM's attention on the CPU supports heads of size 64, not of 16. Answers depend on images if weights are large.
TEXT = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2}
LONG_ROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 32, "long_factor": [2.0] * 32}
OWN_PROMPT = {
    "prompts": {"count": "How many objects are in the image?"},
    "prompt_token_ids": {"count": [0, 6179, 171, 8720, 32, 11, 5, 2274, 116, 2]},
    "fusion_features": ["count", "image"],
}
# The fixture of each, and changes of its configuration.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama-small", {"text_config": {**TEXT, "head_dim": 64}}),
    "phi": ("phi-small", {"text_config": {**TEXT, "rope_parameters": LONG_ROPE}}),
    "own-prompt": ("llama-small", {"text_config": {**TEXT, "head_dim": 64}, **OWN_PROMPT}),
}
REQUESTS = {
    "no image": ([], "What is a circle?"),
    "one image": (["odd.jpg"], "What is shown in the image?"),
    "alpha": (["alpha.png"], "What is shown in the image?"),
    "two images": (["odd.jpg", "wide.png"], "What is different?"),
    "two images, exchanged": (["wide.png", "odd.jpg"], "What is different?"),
}


def build(fixture: str, changes: dict[str, Any]) -> tuple[FlorenceVLForConditionalGeneration, FlorenceVLProcessor]:
    """Return the fixture's vision tower with a new projector and language model, and its processor."""
    checkpoint, vision_tower = FIXTURES / fixture / "checkpoint", FIXTURES / fixture / "vision_tower"
    original, processor = load_original(checkpoint, vision_tower=vision_tower if vision_tower.is_dir() else None)
    settings = original.config.to_dict()
    # Where there is a single group, views can have strides that vLLM's kernels refuse.
    settings["vision_config"]["vision_config"]["num_groups"][0] = 1
    changes = {**changes, "text_config": settings["text_config"] | changes["text_config"]}
    torch.manual_seed(0)
    model = FlorenceVLForConditionalGeneration(FlorenceVLConfig(**settings | changes))
    model.model.vision_tower.load_state_dict(original.model.vision_tower.state_dict())
    model.generation_config = original.generation_config
    # As in converted checkpoints. vLLM does not read `suppress_tokens`, nor that the image token is never generated.
    unused = [*(model.generation_config.suppress_tokens or []), model.config.image_token_id]
    model.lm_head.weight.data[unused] = 0
    return model.float().eval(), processor


def save(variant: str) -> None:
    fixture, changes = VARIANTS[variant]
    model, processor = build(fixture, changes)
    model.save_pretrained(MODELS / variant)
    processor.save_pretrained(MODELS / variant)
    requests = {}
    for name, (files, question) in REQUESTS.items():
        images = [str(FIXTURES / fixture / "images" / file) for file in files]
        text = {"type": "text", "text": question}
        content = [*({"type": "image", "path": image} for image in images), text]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=images or None, text=prompt, add_special_tokens=False, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS, do_sample=False)
        served = [*({"type": "image_url", "image_url": {"url": f"file://{image}"}} for image in images), text]
        requests[name] = {
            "messages": [{"role": "user", "content": served}],
            "images": images,
            "prompt": prompt,
            "prompt_ids": inputs["input_ids"][0].tolist(),
            "prompt_ids_with_special_tokens": processor(images=images or None, text=prompt)["input_ids"][0],
            "answer_ids": output[0, inputs["input_ids"].shape[1] :].tolist(),
        }
    (MODELS / variant / "requests.json").write_text(json.dumps(requests), encoding="utf-8")


if __name__ == "__main__":
    shutil.rmtree(MODELS, ignore_errors=True)
    for variant in VARIANTS:
        save(variant)
