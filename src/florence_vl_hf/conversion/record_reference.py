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
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file


LOGITS_STRIDE = 5  # every fifth entry of the vocabulary is kept
MAX_NEW_TOKENS = 16
IMAGE_TOKEN_INDEX = -200  # the original's placeholder of an image among token ids


def capture_features(model: Any) -> dict[str, torch.Tensor]:
    """Return a dict that is filled with the features of one image whenever the model runs and the dict is empty."""
    tower = model.get_vision_tower()
    captured: dict[str, torch.Tensor] = {}

    def capture(module: torch.nn.Module, *names: str) -> None:
        # The first call and its first row count: the tower may encode an image once per prompt.
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            outputs = (output,) if isinstance(output, torch.Tensor) else output
            for name, tensor in zip(names, outputs, strict=False):
                captured.setdefault(name, tensor.detach()[:1].float().cpu())

        module.register_forward_hook(hook)

    # DaViT's own `forward` is never called, only its block groups: each returns its positions and their grid size.
    capture(tower.vision_tower.vision_tower.blocks[-1], "davit")
    # The projector's inputs: V, and V't1 to V't3 along channels.
    capture(tower, "image_feature", "encoder_last_hidden_state")
    capture(model.get_model().mm_projector, "projected")
    return captured


@torch.no_grad()
def record(
    model: Any, token_ids: list[int], images: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]], list[dict[str, Any]]]:
    """Run the model on each image, given as pixel values of shape `(3, height, width)` by name, with the same prompt.

    Returns the tensors by name, and the lists `forwards` and `generations` of the record.
    """
    captured, input_ids = capture_features(model), torch.tensor([token_ids], device=model.device)
    features, logits, forwards, generations = [], {}, [], []
    for i, (name, image) in enumerate(images.items()):
        pixel_values = image[None].to(model.device, model.dtype)
        captured.clear()
        output = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), images=pixel_values)
        features.append({"pixel_values": image[None].float().cpu(), **captured})
        logits[f"forward{i}.logits"] = output.logits[..., ::LOGITS_STRIDE].float().cpu().contiguous()
        forwards.append({"rows": [{"dialog": 0, "image": name}], "input_ids": [token_ids]})
        # Only new tokens are returned, since the prompt is passed as embeddings.
        new_ids = model.generate(
            input_ids, images=pixel_values, do_sample=False, num_beams=1, max_new_tokens=MAX_NEW_TOKENS
        )
        generation = {"chat_input_ids": token_ids, "generated_ids": new_ids[0].tolist()}
        generations.append({"dialog": 0, "image": name, **generation})
    tensors = {name: torch.cat([feature[name] for feature in features]).contiguous() for name in features[0]}
    return {**tensors, **logits}, forwards, generations


def preprocess(image: Image.Image, image_processor: Any, model_config: Any) -> torch.Tensor:
    """Return the pixel values of one image as the original computes them, of shape `(3, height, width)`."""
    from llava.mm_utils import process_images

    if getattr(model_config, "image_aspect_ratio", None) == "pad":
        return process_images([image], image_processor, model_config)[0]
    # `process_images` passes the image as the first argument, which is the text of Florence-2's processor. This is the
    # call of the original's training data.
    inputs = image_processor(text=["Describe the image."], images=image, return_tensors="pt", padding=True)
    return inputs["pixel_values"][0]


def write(output: Path, tensors: dict[str, torch.Tensor], record: dict[str, Any], image_directory: Path) -> None:
    """Write the reference: tensors, record, and copies of the images that the record names."""
    copies = output.parent / "images"
    copies.mkdir(parents=True, exist_ok=True)
    if image_directory.resolve() != copies.resolve():
        for name in record["images"]:
            shutil.copyfile(image_directory / name, copies / name)
    save_file(tensors, output)
    output.with_suffix(".json").write_text(json.dumps(record) + "\n", encoding="utf-8")


def load_original(checkpoint: str, vision_tower: "str | None", device: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Load the original's tokenizer and model, with the weights as stored."""
    import llava.model  # noqa: F401, registers the model types with the Auto classes
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    # `load_pretrained_model` would cast to float16 and choose the class by the name of the directory.
    config = AutoConfig.from_pretrained(checkpoint)
    if vision_tower is not None:
        config.mm_vision_tower = vision_tower
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, use_fast=False)
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, config=config, torch_dtype=dtype)
    model.get_vision_tower().to(dtype)  # it is built in bfloat16
    return tokenizer, model.to(device).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
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

    names = sorted(p.name for p in arguments.images.iterdir() if p.suffix.lower() in Image.registered_extensions())
    if not names:
        sys.exit(f"There are no images in {arguments.images}.")
    # TensorFloat-32 is a thousand times coarser than float32.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    dtype = getattr(torch, arguments.dtype)
    tokenizer, model = load_original(arguments.checkpoint, arguments.vision_tower, arguments.device, dtype)
    config, image_processor = model.config, model.get_vision_tower().image_processor

    conv_mode = arguments.conv_mode or ("phi3" if config.model_type == "llava_phi" else "llama3")
    conversation = conv_templates[conv_mode].copy()
    turn = {"from": "human", "value": f"<image>\n{arguments.question}"}
    conversation.append_message(conversation.roles[0], turn["value"])
    conversation.append_message(conversation.roles[1], None)
    token_ids = tokenizer_image_token(conversation.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX)

    images = {}
    for name in names:
        images[name] = preprocess(Image.open(arguments.images / name).convert("RGB"), image_processor, config)
    tensors, forwards, generations = record(model, token_ids, images)
    contents = {
        "family": config.model_type,
        "dtype": arguments.dtype,
        "images": names,
        "image_size": tensors["pixel_values"].shape[-1],
        "image_aspect_ratio": getattr(config, "image_aspect_ratio", None),
        "image_token_placeholder": IMAGE_TOKEN_INDEX,
        "dialogs": [{"conversations": [turn], "chat_input_ids": token_ids}],
        "forwards": forwards,
        "generations": generations,
    }
    write(arguments.output, tensors, contents, arguments.images)
    sys.stdout.write(
        f"One image takes {tensors['projected'].shape[1]} image tokens; DaViT returns {tensors['davit'].shape[1]} "
        f"positions.\nWrote {arguments.output}, its .json and images/ with {len(names)} images.\n"
    )


if __name__ == "__main__":
    main()
