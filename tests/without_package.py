# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Run by test_remote_code.py in an interpreter without the package: load saved directories with their own code."""

import contextlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any


sys.modules["florence_vl_hf"] = None  # as if it were not installed: importing it fails

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    pipeline,
)


AUTO_CLASSES = (AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor)
TRUSTED: dict[str, Any] = {"trust_remote_code": True}
TEMPLATE = {"tokenize": True, "add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}


def error_of(function: Any, *arguments: Any, **kwargs: Any) -> str:
    try:
        function(*arguments, **kwargs)
    except ValueError as error:
        return str(error)
    return ""


def messages_about(image: str) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": [{"type": "image", "path": image}, {"type": "text", "text": "What is shown?"}]}
    ]


@torch.no_grad()
def load_and_run(directory: str, image: str) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Load a directory through every Auto class, and return the names of the classes and what the models compute."""
    loaded = {auto.__name__: auto.from_pretrained(directory, **TRUSTED) for auto in AUTO_CLASSES}
    inputs = loaded["AutoProcessor"].apply_chat_template(messages_about(image), **TEMPLATE)
    model = loaded["AutoModelForImageTextToText"].eval()
    tensors = {
        "logits": model(**inputs).logits,
        "hidden": loaded["AutoModel"].eval()(**inputs).last_hidden_state,
        "generated": model.generate(**inputs, max_new_tokens=5),
    }
    return {name: f"{type(thing).__module__}.{type(thing).__name__}" for name, thing in loaded.items()}, tensors


def run_card(directory: str, image: str) -> str:
    """Run the Python block of a directory's model card, and return what it prints."""
    block = re.findall(r"```python\n(.*?)```", (Path(directory) / "README.md").read_text(), flags=re.DOTALL)[0]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(block.replace(f'"{Path(directory).name}"', repr(directory)).replace('"street.jpg"', repr(image)), {})
    return printed.getvalue()


def main(output: Path, image: str, converted: str, directories: dict[str, str]) -> None:
    processor = AutoProcessor.from_pretrained(converted, **TRUSTED)
    model = AutoModelForImageTextToText.from_pretrained(converted, **TRUSTED)
    model.save_pretrained(output / "saved-again")
    processor.save_pretrained(output / "saved-again")
    directories["saved again without the package"] = str(output / "saved-again")

    pipe = pipeline("image-text-to-text", model=converted, dtype=torch.float32, **TRUSTED)
    facts: dict[str, Any] = {
        "refusals": [error_of(auto.from_pretrained, converted, trust_remote_code=False) for auto in AUTO_CLASSES],
        "no_template": error_of(processor.apply_chat_template, messages_about(image), chat_template="plain"),
        "pipeline": pipe(text=messages_about(image), max_new_tokens=5)[0]["generated_text"][-1]["content"],
        "card": run_card(converted, image),
        "classes": {},
    }
    for number, (name, directory) in enumerate(directories.items()):
        facts["classes"][name], tensors = load_and_run(directory, image)
        save_file(tensors, output / f"{number}.safetensors")
    (output / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], json.loads(sys.argv[4]))
