# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Numbers that no model has end in one error, before anything of their size is built."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from florence_vl_hf.conversion import (
    CheckpointError,
    assemble,
    convert,
    export,
    load_pretrained,
    read_original,
)

from .conftest import LLAMA, PHI
from .test_assemble_florence_vl import save_llm


NAN = float("nan")
HUGE = 10**9


@pytest.fixture(autouse=True)
def _in_time() -> Iterator[None]:
    start = time.perf_counter()
    yield
    assert time.perf_counter() - start < 5


@pytest.fixture
def original(llama_copy: Path) -> Path:
    """An original with its tower's directory inside."""
    shutil.copytree(LLAMA.vision_tower, llama_copy / "vision_tower")
    return llama_copy


def change(file: Path, path: str, value: Any) -> None:
    """Change a setting, given as `outer.inner`, of a JSON file."""
    content = json.loads(file.read_text())
    *parents, name = path.split(".")
    settings = content
    for parent in parents:
        settings = settings[parent]
    settings[name] = value
    file.write_text(json.dumps(content))


LANGUAGE_MODEL = [
    ("vocab_size", 5_000_000),
    ("vocab_size", HUGE),
    ("vocab_size", -5),
    ("vocab_size", "many"),
    ("num_hidden_layers", 100_000),
    ("num_hidden_layers", HUGE),
    ("num_hidden_layers", 2.5),
    ("hidden_size", HUGE),
    ("num_attention_heads", 0),
    ("num_key_value_heads", 0),
    ("rope_theta", -1),
    ("rope_theta", 0),
    ("rope_theta", NAN),
    ("rope_scaling", {"rope_type": "linear", "factor": -1.0}),
    ("rope_scaling", {"rope_type": "llama3"}),
    ("rope_scaling", "linear"),
    ("rms_norm_eps", NAN),
    ("rms_norm_eps", float("inf")),
    ("pad_token_id", -1),
    ("pad_token_id", HUGE),
    ("eos_token_id", [2, -1]),
    ("hidden_act", "nope"),
]


@pytest.mark.parametrize(("name", "value"), [*LANGUAGE_MODEL, ("mm_projector_type", "mlp999999x_gelu")])
def test_language_model_of_an_original(name, value, original):
    change(original / "config.json", name, value)
    with pytest.raises(CheckpointError):
        read_original(original)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vision_config.depths", [1, 1, 100_000, 1]),
        ("vision_config.depths", [1, 1, HUGE, 1]),
        ("vision_config.num_heads", [0, 4, 8, 12]),
        ("vision_config.patch_stride", [0, 2, 2, 2]),
        ("vision_config.patch_padding", [-5, 1, 1, 1]),
        ("vision_config.window_size", 0),
        ("vision_config.drop_path_rate", NAN),
        ("vision_config.image_pos_embed", {"type": "learned_abs_2d"}),
        ("vision_config.image_pos_embed", "learned_abs_2d"),
        ("vision_config.image_feature_source", "mean"),
        ("text_config.encoder_layers", 100_000),
        ("text_config.encoder_layers", HUGE),
        ("text_config.decoder_layers", HUGE),
        ("text_config.encoder_attention_heads", 0),
        ("text_config.pad_token_id", -4),
        ("text_config.activation_function", "nope"),
    ],
)
def test_vision_tower_of_an_original(name, value, original):
    change(original / "vision_tower" / "config.json", name, value)
    with pytest.raises(CheckpointError):
        read_original(original)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_std", [0.0, 0.0, 0.0]),
        ("image_std", [0.2]),
        ("image_std", "high"),
        ("image_std", ["a", "b", "c"]),
        ("image_processor", []),
        ("image_mean", [NAN, 0.5, 0.5]),
        ("size", {"height": HUGE, "width": HUGE}),
        ("size", {"height": -96, "width": -96}),
        ("size", {"height": "96", "width": "96"}),
        ("size", 96),
    ],
)
def test_images_of_an_original(name, value, original):
    change(original / "vision_tower" / "preprocessor_config.json", name, value)
    with pytest.raises(CheckpointError):
        read_original(original)


@pytest.mark.parametrize(("name", "value"), [("eos_token_id", -1), ("pad_token_id", HUGE)])
def test_generation_settings_of_an_original(name, value, original):
    change(original / "generation_config.json", name, value)
    with pytest.raises(CheckpointError, match=f"generation_config.json.*{name}"):
        read_original(original)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("converted") / "model"
    convert(LLAMA.checkpoint, output, LLAMA.vision_tower)
    return output


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("text_config.num_hidden_layers", 100_000),
        ("text_config.vocab_size", HUGE),
        ("text_config.hidden_size", HUGE),
        ("text_config.rope_parameters.rope_theta", -1.0),
        ("text_config.pad_token_id", -1),
        ("vision_config.vision_config.depths", [1, 1, HUGE, 1]),
        ("vision_config.text_config.encoder_layers", HUGE),
        ("vision_config.text_config.encoder_attention_heads", 0),
        ("projector_depth", 999_999),
        ("image_size", -1),
    ],
)
@pytest.mark.parametrize("use", ["export", "load", "base"])
def test_converted_model(use, name, value, model, tmp_path):
    directory = Path(shutil.copytree(model, tmp_path / "model"))
    change(directory / "config.json", name, value)
    with pytest.raises(CheckpointError):
        if use == "export":
            export(directory, tmp_path / "out")
        elif use == "load":
            load_pretrained(directory)
        else:
            (tmp_path / "adapter").mkdir()
            (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
            read_original(tmp_path / "adapter", base=directory)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_hidden_layers", HUGE), ("vocab_size", HUGE), ("rope_parameters.rope_theta", -1.0), ("bos_token_id", -3)],
)
def test_parts_of_a_new_model(name, value, tmp_path):
    change(save_llm(tmp_path / "llm", "llama") / "config.json", name, value)
    with pytest.raises(CheckpointError, match=name.split(".")[-1].split("_")[0]):
        assemble(PHI.checkpoint / "vision_tower", tmp_path / "llm", tmp_path / "out")


@pytest.mark.parametrize("content", ["", "[]", "{}", "null", "\udcff"])
@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "tokenizer.json", "model.safetensors"])
def test_damaged_files_of_a_converted_model(name, content, model, tmp_path):
    """One error that names the directory or the file, whatever the libraries raise."""
    directory = Path(shutil.copytree(model, tmp_path / "model"))
    (directory / name).write_text(content, encoding="utf-8", errors="surrogateescape")
    for use in (lambda: export(directory, tmp_path / "out"), lambda: load_pretrained(directory)):
        with pytest.raises(CheckpointError, match=f"{directory}|{name}"):
            use()


@pytest.mark.parametrize("use", [load_pretrained, read_original])
def test_empty_path(use):
    """It would be the current directory."""
    with pytest.raises(CheckpointError, match="empty path"):
        use("")
