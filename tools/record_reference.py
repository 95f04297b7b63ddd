# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Record what the original Florence-VL computes, for `florence-vl verify`.

Runs where the original runs: its repository (the package `llava`) and transformers 4.43. Nothing of florence_vl_hf is
needed there. The original executes the code in its vision tower's folder; give it only towers that you trust.

    python record_reference.py --checkpoint jiuhai/florence-vl-8b-sft --images pictures --output reference.safetensors

writes the tensors, what was asked into a JSON file of the same name, and copies of the pictures into `images` beside
the two. It also says how many image tokens one picture takes. Where the checkpoint's config.json names a tower that
only its authors have, say `--vision-tower jiuhai/florence-llama-vision-tower`: the checkpoint's own weights go over
it. Record in float32, the default: the tolerances of `florence-vl verify` are meant for it.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file


LOGITS_STRIDE = 5  # every fifth entry of the vocabulary is kept
NEW_TOKENS = 16
IMAGE_MARK = -200  # of the image, among token ids
FEATURES = ("davit", "image_feature", "encoder_last_hidden_state", "projected")


def watch(model):
    """Keep the features of the last image that the model looked at, in a dict that it fills whenever it runs."""
    seen = {}

    def keep(module, pick):
        # The first time counts, and the first row: the tower may look at an image once per prompt.
        def hook(_module, _inputs, output):
            for name, tensor in pick(output).items():
                seen.setdefault(name, tensor.detach()[:1].float().cpu())

        module.register_forward_hook(hook)

    tower = model.get_vision_tower()
    davit = tower.vision_tower.vision_tower
    # DaViT's own `forward` is never called, only its stages are: each gives its positions and the size of their grid.
    keep(davit.blocks[-1], lambda output: {"davit": output[0]})
    # What the tower hands to the projector: V, and V't1 to V't3 along channels.
    keep(tower, lambda output: {"image_feature": output[0], "encoder_last_hidden_state": output[1]})
    keep(model.get_model().mm_projector, lambda output: {"projected": output})
    return seen


@torch.no_grad()
def record(model, pictures):
    """
    Run the model on pictures, one at a time.

    Args:
        model: The original.
        pictures: Name, pixel values of shape (3, height, width) and token ids of the prompt, of each picture.

    Returns:
        The tensors by name, and the `forwards` and `generations` of the record.
    """
    seen = watch(model)
    features = {name: [] for name in ("pixel_values", *FEATURES)}
    tensors, forwards, generations = {}, [], []
    for i, (name, pixel_values, token_ids) in enumerate(pictures):
        images = pixel_values[None].to(model.device, model.dtype)
        input_ids = torch.tensor([token_ids], device=model.device)
        seen.clear()
        output = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), images=images)
        features["pixel_values"].append(pixel_values[None].float().cpu())
        for feature in FEATURES:
            features[feature].append(seen[feature])
        tensors[f"forward{i}.logits"] = output.logits[..., ::LOGITS_STRIDE].float().cpu().contiguous()
        row = {"dialog": 0, "image": name}
        forwards.append({"rows": [row], "input_ids": [token_ids], "attention_mask": [[1] * len(token_ids)]})
        # Only the new tokens come back, since the prompt goes in as embeddings.
        new_ids = model.generate(input_ids, images=images, do_sample=False, num_beams=1, max_new_tokens=NEW_TOKENS)
        generations.append({**row, "chat_input_ids": token_ids, "generated_ids": new_ids[0].tolist()})
    tensors.update({name: torch.cat(rows).contiguous() for name, rows in features.items()})
    return tensors, forwards, generations


def write(output, tensors, record, folder):
    """Write the reference: tensors, record, and copies of the pictures that the record names."""
    output.parent.mkdir(parents=True, exist_ok=True)
    copies = output.parent / "images"
    copies.mkdir(exist_ok=True)
    for name in record["images"]:
        if (folder / name).resolve() != (copies / name).resolve():
            shutil.copyfile(folder / name, copies / name)
    save_file(tensors, output)
    output.with_suffix(".json").write_text(json.dumps(record) + "\n", encoding="utf-8")


def load_original(checkpoint, vision_tower, device, dtype):
    """The original's tokenizer and model, its weights as they are stored."""
    import llava.model  # noqa: F401, it makes the model types known to the Auto classes
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    # Not by `load_pretrained_model`, which rounds all weights to float16 and tells models apart by the folder's name.
    config = AutoConfig.from_pretrained(checkpoint)
    if vision_tower is not None:
        config.mm_vision_tower = vision_tower
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, use_fast=False)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, config=config, torch_dtype=dtype)
    model.get_vision_tower().to(dtype)  # it loads itself in bfloat16
    return tokenizer, model.to(device).eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="folder or Hub id of the original checkpoint")
    parser.add_argument("--images", required=True, type=Path, help="folder of pictures; a few are enough")
    parser.add_argument("--output", required=True, type=Path, help="the file to write, FILE.safetensors")
    parser.add_argument("--vision-tower", help="folder or Hub id of the tower, instead of what config.json says")
    parser.add_argument("--conv-mode", help="name of the conversation; by default phi3 or llama3, as the model is")
    parser.add_argument("--question", default="Describe this image in detail.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    arguments = parser.parse_args()

    from llava.conversation import conv_templates
    from llava.mm_utils import process_images, tokenizer_image_token

    # TensorFloat-32 would be a thousand times coarser than float32.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    dtype = getattr(torch, arguments.dtype)
    tokenizer, model = load_original(arguments.checkpoint, arguments.vision_tower, arguments.device, dtype)
    tower = model.get_vision_tower()

    conv_mode = arguments.conv_mode or ("phi3" if model.config.model_type == "llava_phi" else "llama3")
    conversation = conv_templates[conv_mode].copy()
    conversation.append_message(conversation.roles[0], "<image>\n" + arguments.question)
    conversation.append_message(conversation.roles[1], None)
    prompt = conversation.get_prompt()
    token_ids = tokenizer_image_token(prompt, tokenizer, IMAGE_MARK)

    names = sorted(p.name for p in arguments.images.iterdir() if p.suffix.lower() in Image.registered_extensions())
    if not names:
        sys.exit(f"There is no picture in {arguments.images}.")
    pictures = []
    for name in names:
        image = Image.open(arguments.images / name).convert("RGB")
        pictures.append((name, process_images([image], tower.image_processor, model.config)[0], token_ids))

    tensors, forwards, generations = record(model, pictures)
    num_image_tokens = tensors["projected"].shape[1]
    human = {"from": "human", "value": "<image>\n" + arguments.question}
    dialog = {"conversations": [human], "has_image": True, "chat_prompt": prompt, "chat_input_ids": token_ids}
    written = {
        "family": model.config.model_type,
        "dtype": arguments.dtype,
        "images": names,
        "image_size": tensors["pixel_values"].shape[-1],
        "image_aspect_ratio": getattr(model.config, "image_aspect_ratio", None),
        "image_token_placeholder": IMAGE_MARK,
        "num_image_tokens": num_image_tokens,
        "dialogs": [dialog],
        "forwards": forwards,
        "generations": generations,
    }
    write(arguments.output, tensors, written, arguments.images)
    sys.stdout.write(
        f"One picture takes {num_image_tokens} image tokens; DaViT gives {tensors['davit'].shape[1]} positions.\n"
        f"Wrote {arguments.output}, its .json and images of {len(names)} pictures.\n"
    )


if __name__ == "__main__":
    main()
