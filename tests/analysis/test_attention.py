# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from florence_vl_hf.analysis.attention import _words, attend
from florence_vl_hf.conversion import assemble, load_pretrained

from ..conversion.test_assemble_florence_vl import llama, native


__all__ = ["llama", "native"]


@pytest.fixture(scope="module")
def token_model(native, llama, tmp_path_factory):
    """A model whose language model gets the tokens of three features."""
    output = tmp_path_factory.mktemp("token") / "model"
    assemble(native, llama, output, "token", ["ocr", "image", "caption"], chat_template="vicuna")
    return load_pretrained(output)


def expected_attention(model, processor, image, question, max_new_tokens):
    """The same answer, read in one forward that returns the attention of all tokens to all others."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    output_ids = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        outputs = model(input_ids=output_ids, pixel_values=inputs["pixel_values"], output_attentions=True)
    start = inputs["input_ids"].shape[1]
    weights = torch.stack(outputs.attentions)[:, 0].mean(dim=1)  # (num_layers, sequence_length, sequence_length)
    is_image = output_ids[0] == model.config.image_token_id
    return output_ids[0, start:], weights[:, start - 1 : -1, is_image]


def assert_words_have_their_tokens(answer, token_ids, expected, processor):
    """Each word has the mean attention of a run of tokens in whose text it is."""
    runs = [(start, end) for end in range(1, len(token_ids) + 1) for start in range(end)]
    for word, found in zip(answer.words, answer.weights.flatten(1), strict=True):
        means = {run: expected[slice(*run)].mean(dim=0) for run in runs}
        matching = [run for run, mean in means.items() if torch.allclose(mean, found, rtol=1e-4, atol=1e-7)]
        texts = [processor.decode(token_ids[slice(*run)], skip_special_tokens=True) for run in matching]
        assert any(word.strip("\ufffd") in text for text in texts), (word, texts)


def test_words_have_the_tokens_of_their_characters(llama):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(llama)
    token_ids = [*tokenizer("Say  hello🌍x 🌍! world").input_ids, tokenizer.eos_token_id]
    words, groups = _words(tokenizer, token_ids)
    assert words == ["Say", "hello🌍x", "🌍!", "world"]
    assert [tokenizer.decode(token_ids[group[0] : group[-1] + 1]).strip() for group in groups] == words
    assert all(group == list(range(group[0], group[-1] + 1)) for group in groups)
    assert {token_ids[i] for i in range(len(token_ids))} - {token_ids[i] for group in groups for i in group} <= {
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        *tokenizer(" ", add_special_tokens=False).input_ids,
    }
    assert _words(tokenizer, [tokenizer.eos_token_id]) == ([], [])


class TestAttend:
    @pytest.mark.parametrize("layer", [None, 1])
    def test_equals_one_forward_over_the_answer(self, layer, converted, golden):
        model, processor = load_pretrained(converted, dtype=torch.float32)
        image = golden.image("odd.jpg")
        answer = attend(model, processor, image, "What is it?", layer, max_new_tokens=8)
        assert model.model.language_model.config._attn_implementation == "sdpa"
        token_ids, weights = expected_attention(model, processor, image, "What is it?", 8)
        expected = weights.mean(dim=0) if layer is None else weights[layer]
        assert " ".join(answer.words).split() == processor.decode(token_ids, skip_special_tokens=True).split()
        assert answer.parts == ["fused"] and answer.weights.shape[2] == model.config.num_image_tokens
        assert_words_have_their_tokens(answer, token_ids, expected, processor)

    def test_token_fusion_has_the_tokens_of_each_feature(self, token_model):
        model, processor = token_model
        image = Image.effect_noise((80, 60), 90).convert("RGB")
        answer = attend(model, processor, image, "Hello world", max_new_tokens=12)
        assert answer.parts == ["ocr", "image", "caption"]
        token_ids, weights = expected_attention(model, processor, image, "Hello world", 12)
        assert answer.weights.shape[1:] == (3, 5)
        assert_words_have_their_tokens(answer, token_ids, weights.mean(dim=0), processor)

    def test_wrong_layer(self, token_model):
        with pytest.raises(ValueError, match="Got layer 2; the language model has layers 0 to 1"):
            attend(*token_model, Image.new("RGB", (8, 8)), "What?", layer=2)
