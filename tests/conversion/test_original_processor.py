# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer

from florence_vl_hf.conversion import CheckpointError, read_original
from florence_vl_hf.conversion.original_config import Assumption
from florence_vl_hf.conversion.original_processor import load_original_tokenizer

from .conftest import LLAMA, edit_config


class TestVocabulary:
    def test_every_token_keeps_its_id(self, golden, processor, tmp_path):
        # Apart from its config.json, whose model type Transformers does not know.
        for file in golden.checkpoint.glob("*token*"):
            shutil.copy(file, tmp_path)
        original = AutoTokenizer.from_pretrained(tmp_path).get_vocab()
        assert original.items() <= processor.tokenizer.get_vocab().items()
        assert processor.image_token_id not in original.values()

    def test_free_row_or_new_rows_up_to_a_multiple_of_64(self, processor, model, golden):
        rows = model.config.text_config.vocab_size
        named = {"llama-small": (482, 512), "phi-small": (575, 576)}
        assert (processor.image_token_id, rows) == named[golden.folder.name]
        assert model.get_input_embeddings().weight.shape[0] == model.lm_head.weight.shape[0] == rows

    def test_added_rows_are_never_generated(self, processor, model):
        never = [model.config.image_token_id, *(model.generation_config.suppress_tokens or [])]
        inputs = processor(text="Hi", return_tensors="pt")
        output = model.generate(
            **inputs, max_new_tokens=4, do_sample=True, output_scores=True, return_dict_in_generate=True
        )
        for scores in output.scores:
            assert (scores[:, never] == -torch.inf).all()
        last_named = max(processor.tokenizer.get_vocab().values())
        assert set(range(last_named + 1, model.config.text_config.vocab_size)) <= set(never)


@pytest.mark.parametrize(("aspect_ratio", "do_pad"), [("pad", True), ("square", False), (None, False)])
def test_images_are_padded_after_finetuning_only(aspect_ratio, do_pad, llama_copy):
    edit_config(llama_copy, image_aspect_ratio=aspect_ratio)
    assert read_original(llama_copy, vision_tower=LLAMA.vision_tower).processor.image_processor.do_pad is do_pad


def test_missing_or_damaged_tokenizer_is_an_error(llama_copy):
    (llama_copy / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="tokenizer in .* cannot be loaded"):
        read_original(llama_copy, vision_tower=LLAMA.vision_tower)
    (llama_copy / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer.json and no tokenizer.model"):
        read_original(llama_copy, vision_tower=LLAMA.vision_tower)


def test_missing_tokenizer_settings_are_said(phi_copy, llama_copy):
    """Without them, Phi's special tokens do not strip the white space after them, which changes token ids."""
    assert Assumption.TOKENIZER not in read_original(phi_copy).assumptions
    (phi_copy / "tokenizer_config.json").unlink()
    assert Assumption.TOKENIZER in read_original(phi_copy).assumptions


@pytest.mark.parametrize(
    ("pattern", "is_refused"),
    [
        (r"(\w+\s?)*$", True),
        (r"(?:a|aa)+$", True),
        (r"x|(?:[a-z]+){2,}", True),
        (
            r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            False,
        ),
        (r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|\)+|(?:'s)?""", False),
    ],
)
@pytest.mark.parametrize("part", ["pre_tokenizer", "normalizer"])
def test_regular_expressions_of_exponential_time_are_refused(part, pattern, is_refused, llama_copy):
    """They end the tokenizers library with a panic, which no error handler expects."""
    file = llama_copy / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    step = {"type": "Split", "behavior": "Isolated", "invert": False}
    step = step if part == "pre_tokenizer" else {"type": "Replace", "content": "x"}
    tokenizer[part] = {
        "type": "Sequence",
        {"pre_tokenizer": "pretokenizers", "normalizer": "normalizers"}[part]: [
            step | {"pattern": {"Regex": pattern}}
        ],
    }
    file.write_text(json.dumps(tokenizer))
    if is_refused:
        with pytest.raises(CheckpointError, match=r"tokenizer.json has the regular expression .* repeats a group"):
            read_original(llama_copy, vision_tower=LLAMA.vision_tower)
    else:
        load_original_tokenizer(llama_copy)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"model": 3}'])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "tokenizer.model"])
def test_damaged_files_are_named(name, content, llama_copy, phi_copy):
    directory = phi_copy if name == "tokenizer.model" else llama_copy
    (directory / name).write_text(content)
    if (name, content) == ("tokenizer_config.json", '{"model": 3}'):
        return
    with pytest.raises(CheckpointError, match=str(directory)):
        load_original_tokenizer(directory)
