# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Record what the original Florence-VL computes, for `florence-vl verify`.

Runs in the original's environment: its package `llava`, transformers 4.43, `timm`, and a `flash_attn` that can be
imported (an empty module is enough without a GPU). florence_vl_hf need not be installed there. The original runs the
code in its vision tower's repository; use only towers that you trust.

    python record_reference.py --checkpoint jiuhai/florence-vl-8b-sft --images IMAGES --output reference.safetensors

writes the tensors, a JSON file of the same name with the inputs, and copies of the images into `images` beside them.
It also prints the number of image tokens. If the checkpoint's config.json names a tower that only exists on its
authors' disks, add `--vision-tower jiuhai/florence-llama-vision-tower`: the checkpoint's own weights override it.
Record in float32, the default: the tolerances of `florence-vl verify` assume it.
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
MAX_NEW_TOKENS = 16
IMAGE_TOKEN_INDEX = -200  # the original's placeholder of an image among token ids
FEATURES = ("davit", "image_feature", "encoder_last_hidden_state", "projected")


def capture_features(model):
    """Return a dict that is filled with the features of one image whenever the model runs and the dict is empty."""
    captured = {}

    def capture(module, select):
        # The first call and its first row count: the tower may encode an image once per prompt.
        def hook(_module, _inputs, output):
            for name, tensor in select(output).items():
                captured.setdefault(name, tensor.detach()[:1].float().cpu())

        module.register_forward_hook(hook)

    tower = model.get_vision_tower()
    # DaViT's own `forward` is never called, only its block groups: each returns its positions and their grid size.
    capture(tower.vision_tower.vision_tower.blocks[-1], lambda output: {"davit": output[0]})
    # The projector's inputs: V, and V't1 to V't3 along channels.
    capture(tower, lambda output: {"image_feature": output[0], "encoder_last_hidden_state": output[1]})
    capture(model.get_model().mm_projector, lambda output: {"projected": output})
    return captured


@torch.no_grad()
def record(model, samples):
    """Run the model on samples of an image's name, its pixel values of shape `(3, height, width)` and token ids.

    Returns the tensors by name, and the lists `forwards` and `generations` of the record.
    """
    captured = capture_features(model)
    features = {name: [] for name in ("pixel_values", *FEATURES)}
    tensors, forwards, generations = {}, [], []
    for i, (name, pixel_values, token_ids) in enumerate(samples):
        images = pixel_values[None].to(model.device, model.dtype)
        input_ids = torch.tensor([token_ids], device=model.device)
        captured.clear()
        output = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), images=images)
        captured["pixel_values"] = pixel_values[None].float().cpu()
        for feature, values in features.items():
            values.append(captured[feature])
        tensors[f"forward{i}.logits"] = output.logits[..., ::LOGITS_STRIDE].float().cpu().contiguous()
        row = {"dialog": 0, "image": name}
        forwards.append({"rows": [row], "input_ids": [token_ids], "attention_mask": [[1] * len(token_ids)]})
        # Only new tokens are returned, since the prompt is passed as embeddings.
        new_ids = model.generate(input_ids, images=images, do_sample=False, num_beams=1, max_new_tokens=MAX_NEW_TOKENS)
        generations.append({**row, "chat_input_ids": token_ids, "generated_ids": new_ids[0].tolist()})
    tensors.update({name: torch.cat(values).contiguous() for name, values in features.items()})
    return tensors, forwards, generations


def preprocess(image, image_processor, model_config):
    """Return the pixel values of one image as the original computes them, of shape `(3, height, width)`."""
    from llava.mm_utils import process_images

    if getattr(model_config, "image_aspect_ratio", None) == "pad":
        return process_images([image], image_processor, model_config)[0]
    # `process_images` passes the image as the first argument, which is the text of Florence-2's processor. This is the
    # call of the original's training data.
    return image_processor(text=["Describe the image."], images=image, return_tensors="pt", padding=True)[
        "pixel_values"
    ][0]


def write(output, tensors, record, image_directory):
    """Write the reference: tensors, record, and copies of the images that the record names."""
    copies = output.parent / "images"
    copies.mkdir(parents=True, exist_ok=True)
    for name in record["images"]:
        if (image_directory / name).resolve() != (copies / name).resolve():
            shutil.copyfile(image_directory / name, copies / name)
    save_file(tensors, output)
    output.with_suffix(".json").write_text(json.dumps(record) + "\n", encoding="utf-8")


def load_original(checkpoint, vision_tower, device, dtype):
    """Load the original's tokenizer and model, with the weights as stored."""
    import llava.model  # noqa: F401, registers the model types with the Auto classes
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    # `load_pretrained_model` would cast to float16 and choose the class by the name of the directory.
    config = AutoConfig.from_pretrained(checkpoint)
    if vision_tower is not None:
        config.mm_vision_tower = vision_tower
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, use_fast=False)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, config=config, torch_dtype=dtype)
    model.get_vision_tower().to(dtype)  # it is built in bfloat16
    return tokenizer, model.to(device).eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="directory or Hub id of the original checkpoint")
    parser.add_argument("--images", required=True, type=Path, help="directory of images; a few are enough")
    parser.add_argument("--output", required=True, type=Path, help="file to write, such as reference.safetensors")
    parser.add_argument("--vision-tower", help="directory or Hub id of the tower; overrides config.json")
    parser.add_argument("--conv-mode", help="name of the conversation template; phi3 or llama3 by default")
    parser.add_argument("--question", default="Describe this image in detail.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    arguments = parser.parse_args()

    from llava.conversation import conv_templates
    from llava.mm_utils import tokenizer_image_token

    # TensorFloat-32 is a thousand times coarser than float32.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    dtype = getattr(torch, arguments.dtype)
    tokenizer, model = load_original(arguments.checkpoint, arguments.vision_tower, arguments.device, dtype)

    conv_mode = arguments.conv_mode or ("phi3" if model.config.model_type == "llava_phi" else "llama3")
    conversation = conv_templates[conv_mode].copy()
    user_turn = "<image>\n" + arguments.question
    conversation.append_message(conversation.roles[0], user_turn)
    conversation.append_message(conversation.roles[1], None)
    prompt = conversation.get_prompt()
    token_ids = tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX)

    names = sorted(p.name for p in arguments.images.iterdir() if p.suffix.lower() in Image.registered_extensions())
    if not names:
        sys.exit(f"There are no images in {arguments.images}.")
    image_processor, samples = model.get_vision_tower().image_processor, []
    for name in names:
        image = Image.open(arguments.images / name).convert("RGB")
        samples.append((name, preprocess(image, image_processor, model.config), token_ids))

    tensors, forwards, generations = record(model, samples)
    turns = [{"from": "human", "value": user_turn}]
    dialog = {"conversations": turns, "has_image": True, "chat_prompt": prompt, "chat_input_ids": token_ids}
    contents = {
        "family": model.config.model_type,
        "dtype": arguments.dtype,
        "images": names,
        "image_size": tensors["pixel_values"].shape[-1],
        "image_aspect_ratio": getattr(model.config, "image_aspect_ratio", None),
        "image_token_placeholder": IMAGE_TOKEN_INDEX,
        "num_image_tokens": tensors["projected"].shape[1],
        "dialogs": [dialog],
        "forwards": forwards,
        "generations": generations,
    }
    write(arguments.output, tensors, contents, arguments.images)
    sys.stdout.write(
        f"One image takes {contents['num_image_tokens']} image tokens; DaViT returns {tensors['davit'].shape[1]} "
        f"positions.\nWrote {arguments.output}, its .json and images/ with {len(names)} images.\n"
    )


if __name__ == "__main__":
    main()
