# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import shutil

import pytest
import torch
from transformers import AutoTokenizer

from florence_vl_hf.conversion import CheckpointError, read_original

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
