# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Write captions of all images in a directory to a file: `python batch_captioning.py MODEL IMAGES`."""

import json
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image
from tqdm import tqdm

from florence_vl_hf.conversion import load_pretrained
from florence_vl_hf.serving import load_image


def main(
    model: Annotated[str, typer.Argument(help="Directory or Hub id, such as jiuhai/florence-vl-8b-sft.")],
    images: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Directory of images.")],
    output: Annotated[Path, typer.Option(help="A .jsonl file that does not exist yet.")] = Path("captions.jsonl"),
    question: str = "Describe the image in one paragraph.",
    batch_size: int = 8,
    max_new_tokens: int = 256,
) -> None:
    paths = sorted(path for path in images.iterdir() if path.suffix.lower() in Image.registered_extensions())
    network, processor = load_pretrained(model, dtype="auto", device_map="auto")
    network.eval()
    with output.open("x", encoding="utf-8") as file:
        for start in tqdm(range(0, len(paths), batch_size), desc="Batches"):
            names, conversations = [], []
            for path in paths[start : start + batch_size]:
                try:
                    content = [{"type": "image", "image": load_image(str(path))}, {"type": "text", "text": question}]
                except ValueError as error:
                    tqdm.write(f"Skipping: {error}")
                    continue
                names.append(path.name)
                conversations.append([{"role": "user", "content": content}])
            if not names:
                continue
            # Padding on the left, if questions differ: answers begin at the right end of each row.
            inputs = processor.apply_chat_template(
                conversations, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt",
                processor_kwargs={"padding": True, "padding_side": "left"},
            ).to(network.device, dtype=network.dtype)  # fmt: skip
            output_ids = network.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            answers = processor.batch_decode(output_ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for name, answer in zip(names, answers, strict=True):
                file.write(json.dumps({"image": name, "caption": answer.strip()}, ensure_ascii=False) + "\n")
    typer.echo(f"Wrote {output}.")


if __name__ == "__main__":
    typer.run(main)
