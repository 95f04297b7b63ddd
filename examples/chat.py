# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Chat about an image in several turns, with streamed answers: `python chat.py MODEL IMAGE`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import TextStreamer

from florence_vl_hf.conversion import load_pretrained
from florence_vl_hf.serving import DECODING


def main(
    model: Annotated[str, typer.Argument(help="Directory or Hub id, such as jiuhai/florence-vl-8b-sft.")],
    image: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    max_new_tokens: int = 256,
) -> None:
    network, processor = load_pretrained(model, dtype="auto", device_map="auto")
    network.eval()
    # Prints the words of an answer as soon as they are generated.
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, **DECODING)
    content: list[dict[str, Any]] = [{"type": "image", "path": str(image)}]
    messages: list[dict[str, Any]] = []
    while question := typer.prompt("Question, or nothing to leave", default="", show_default=False):
        content.append({"type": "text", "text": question})
        messages.append({"role": "user", "content": content})
        # All turns so far and the image. `florence_vl_hf.serving.ChatSession` encodes each image only once.
        inputs = processor.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        ).to(network.device, dtype=network.dtype)
        output_ids = network.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer)
        answer = processor.decode(output_ids[0, inputs["input_ids"].shape[1] :], **DECODING)
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer.strip()}]})
        content = []


if __name__ == "__main__":
    typer.run(main)
