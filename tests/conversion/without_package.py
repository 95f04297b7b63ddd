# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Run apart, by test_remote_code.py: what a converted folder gives where the package is not installed."""

import contextlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any


sys.modules["florence_vl_hf"] = None  # as if it were not installed: to import it fails

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


def error_of(function: Any, *arguments: Any, **kwargs: Any) -> str:
    try:
        function(*arguments, **kwargs)
    except ValueError as error:
        return str(error)
    return ""


def main(folder: str, image: str, output: Path) -> None:
    trusted: dict[str, Any] = {"trust_remote_code": True}
    auto_classes = (AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor)
    loaded = {auto.__name__: auto.from_pretrained(folder, **trusted) for auto in auto_classes}
    model, processor = loaded["AutoModelForImageTextToText"].eval(), loaded["AutoProcessor"]
    content = [{"type": "image", "path": image}, {"type": "text", "text": "What is shown?"}]
    messages = [{"role": "user", "content": content}]
    settings = {"tokenize": True, "add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(messages, **settings)
    with torch.no_grad():
        logits = model(**inputs).logits
        hidden = loaded["AutoModel"].eval()(**inputs).last_hidden_state
    pipe = pipeline("image-text-to-text", model=folder, dtype=torch.float32, **trusted)

    model.save_pretrained(output / "saved-again")
    processor.save_pretrained(output / "saved-again")
    again = AutoModelForImageTextToText.from_pretrained(output / "saved-again", **trusted).eval()
    inputs_again = AutoProcessor.from_pretrained(output / "saved-again", **trusted).apply_chat_template(
        messages, **settings
    )
    with torch.no_grad():
        logits_again = again(**inputs_again).logits

    shown = re.findall(r"```python\n(.*?)```", (Path(folder) / "README.md").read_text(), flags=re.DOTALL)[0]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(shown.replace(f'"{Path(folder).name}"', repr(folder)).replace('"street.jpg"', repr(image)), {})

    tensors = {"logits": logits, "hidden": hidden, "generated": model.generate(**inputs, max_new_tokens=5)}
    save_file({**tensors, "logits_again": logits_again}, output / "tensors.safetensors")
    facts = {
        "classes": {name: f"{type(thing).__module__}.{type(thing).__name__}" for name, thing in loaded.items()},
        "refusals": [error_of(auto.from_pretrained, folder, trust_remote_code=False) for auto in auto_classes],
        "no_such_format": error_of(processor.apply_chat_template, messages, chat_template="plain"),
        "pipeline": pipe(text=messages, max_new_tokens=5)[0]["generated_text"][-1]["content"],
        "card": printed.getvalue(),
    }
    (output / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
