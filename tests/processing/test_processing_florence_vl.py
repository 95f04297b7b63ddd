# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import copy
import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from sentencepiece import SentencePieceProcessor
from torch.testing import assert_close
from transformers import AutoProcessor, AutoTokenizer, LlavaImageProcessorPil

from florence_vl_hf import FlorenceVLProcessor
from florence_vl_hf.conversion.original_processor import add_image_token, load_original_tokenizer
from florence_vl_hf.processing import CHAT_TEMPLATES, load_chat_template

from ..conftest import FIXTURES, IMAGE_PLACEHOLDER, collapse


def with_placeholders(ids: list[int], processor: FlorenceVLProcessor) -> list[int]:
    """Token ids as the original records them: one placeholder per image."""
    replaced = [IMAGE_PLACEHOLDER if token == processor.image_token_id else token for token in ids]
    return collapse(ids, replaced, processor.image_token_id)


class TestAgainstTheOriginal:
    def test_pixel_values(self, golden, processor):
        images = [golden.image(name) for name in golden.reference["images"]]
        pixel_values = processor.image_processor(images, return_tensors="pt").pixel_values
        difference = (pixel_values - golden.tensors["pixel_values"]).abs()
        assert (difference <= 1e-6).float().mean() >= 0.999
        assert difference.max() <= 1 / 255 / min(processor.image_processor.image_std) + 1e-6

    def test_token_ids_of_dialogs(self, golden, processor):
        for number, dialog in enumerate(golden.reference["dialogs"]):
            messages = golden.messages(number)
            whole = processor.apply_chat_template(messages, tokenize=True, return_dict=True)
            assert with_placeholders(whole["input_ids"][0], processor) == dialog["train_input_ids"]
            prompt = processor.apply_chat_template(
                messages[:-1], tokenize=True, return_dict=True, add_generation_prompt=True
            )
            assert with_placeholders(prompt["input_ids"][0], processor) == dialog["chat_input_ids"]

    def test_assistant_mask_equals_the_labels(self, golden, processor):
        num_compared = 0
        for number, dialog in enumerate(golden.reference["dialogs"]):
            inputs = processor.apply_chat_template(
                golden.messages(number), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            ids, mask = inputs["input_ids"][0], inputs["assistant_masks"][0]
            labels = [token if learned else -100 for token, learned in zip(ids, mask, strict=True)]
            labels = collapse(ids, labels, processor.image_token_id)
            if set(dialog["train_labels"]) == {-100}:
                # The original masks this sample completely; here every turn is trained.
                num_turns = sum(turn["from"] == "gpt" for turn in dialog["conversations"])
                starts = [i for i in range(1, len(labels)) if labels[i] != -100 and labels[i - 1] == -100]
                assert len(starts) == num_turns
            else:
                assert labels == dialog["train_labels"]
                num_compared += 1
        assert num_compared >= 5

    def test_plain(self, golden, processor):
        for sample in golden.reference["plain"]:
            messages = [
                {"role": "user", "content": [{"type": "image", "image": golden.image("odd.jpg")}]},
                {"role": "assistant", "content": [{"type": "text", "text": sample["caption"]}]},
            ]
            inputs = processor.apply_chat_template(
                messages,
                chat_template="plain",
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            ids, mask = inputs["input_ids"][0], inputs["assistant_masks"][0]
            assert with_placeholders(ids, processor) == sample["train_input_ids"]
            labels = [token if learned else -100 for token, learned in zip(ids, mask, strict=True)]
            assert collapse(ids, labels, processor.image_token_id) == sample["train_labels"]


class TestChatTemplates:
    def test_image_tokens_in_text_equal_image_items(self, golden, processor):
        items = golden.messages(2)[:1]
        text = golden.reference["dialogs"][2]["conversations"][0]["value"]
        assert "<image>" in text[1:]
        as_string = [{"role": "user", "content": text}]
        assert processor.apply_chat_template(as_string) == processor.apply_chat_template(items)

    def test_images_of_a_turn_come_first_one_per_line(self, processor):
        content = [{"type": "text", "text": "Compare "}, {"type": "image"}, {"type": "image"}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}])
        lines = prompt[prompt.index("<image>") :].split("\n")
        assert [line.strip() for line in lines[:2]] == ["<image>", "<image>"]
        assert lines[2].startswith("Compare")

    def test_system_message_replaces_the_default(self, processor):
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
        prompt = processor.apply_chat_template(messages)
        assert "Be brief." in prompt
        assert "assistant gives helpful" not in prompt and "You are a helpful" not in prompt

    @pytest.mark.parametrize("name", CHAT_TEMPLATES)
    def test_every_template_masks_the_answers(self, name, processor):
        messages = [
            {"role": "user", "content": "One?"},
            {"role": "assistant", "content": "Two."},
            {"role": "user", "content": "Three?"},
            {"role": "assistant", "content": "Four."},
        ]
        inputs = processor.apply_chat_template(
            messages, chat_template=name, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        answers = [
            token for token, mask in zip(inputs["input_ids"][0], inputs["assistant_masks"][0], strict=True) if mask
        ]
        text = processor.decode(answers)
        end = {"llama3": "<|eot_id|>", "phi3": "<|end|>", "vicuna": "</s>", "plain": "\n"}[name]
        assert text.replace(" ", "").replace("\n", "") == f"Two.{end}Four.{end}".replace("\n", "")

    def test_vicuna_template(self, processor):
        messages = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}] * 2
        prompt = processor.apply_chat_template(messages[:3], chat_template="vicuna", add_generation_prompt=True)
        assert prompt.endswith("'s questions. USER: Hi. ASSISTANT: Hello.</s>USER: Hi. ASSISTANT:")

    @pytest.mark.parametrize(
        ("messages", "error"),
        [
            ([{"role": "tool", "content": "42"}], "Got a turn of tool"),
            ([{"role": "user", "content": [{"type": "audio", "path": "a.wav"}]}], "Got content of type audio"),
        ],
    )
    def test_what_the_model_cannot_read_is_an_error(self, messages, error, processor):
        with pytest.raises(Exception, match=error):
            processor.apply_chat_template(messages)

    def test_unknown_format_is_an_error(self, processor):
        with pytest.raises(ValueError, match="choose one of llama3, phi3, plain, vicuna"):
            load_chat_template("chatml", processor.tokenizer)
        with pytest.raises(ValueError, match="choose one of llama3, phi3, plain, vicuna"):
            processor.apply_chat_template([{"role": "user", "content": "Hi"}], chat_template="chatml")

    def test_templates_of_the_processor(self, processor):
        own = copy.copy(processor)
        own.chat_template = {"default": processor.chat_template, "shout": "{{ messages[0].content | upper }}"}
        messages = [{"role": "user", "content": "Hi"}]
        assert own.apply_chat_template(messages, chat_template="shout") == "HI"
        assert own.apply_chat_template(messages, chat_template="{{ messages | length }}") == "1"
        assert own.apply_chat_template(messages) == processor.apply_chat_template(messages)


class TestVicunaTokenizer:
    """Compare one tokenized prompt with the pieces of the original, tokenized by SentencePiece itself."""

    @pytest.mark.parametrize("legacy", [True, False, None])
    def test_token_ids_of_two_turns(self, legacy, tmp_path):
        shutil.copy(FIXTURES / "phi-small" / "checkpoint" / "tokenizer.model", tmp_path)
        settings = {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": True,
            "bos_token": "<s>",
            "eos_token": "</s>",
        }
        settings |= {"unk_token": "<unk>", "pad_token": "<unk>"} | ({} if legacy is None else {"legacy": legacy})
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        tokenizer = load_original_tokenizer(tmp_path)
        pieces = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
        image_token_id, _ = add_image_token(tokenizer, pieces.get_piece_size())

        def text(part: str, first: bool) -> list[int]:
            if legacy is False and not first:  # no space before text that follows a special token
                return pieces.encode("<unk>" + part)[len(pieces.encode("<unk>")) :]
            return pieces.encode(part)

        system = (
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        )
        system += "detailed, and polite answers to the user's questions."
        end = tokenizer.eos_token_id
        expected = [tokenizer.bos_token_id, *text(system + " USER: ", first=True), image_token_id]
        expected += [*text("\nHow many? ASSISTANT: Three", first=True), end]
        expected += [*text("USER: Sure? ASSISTANT: Yes.", first=False), end]

        template = load_chat_template("vicuna", tokenizer)
        messages = [
            {"role": "user", "content": "<image>\nHow many?"},
            {"role": "assistant", "content": "Three"},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "Yes."},
        ]
        ids = tokenizer.apply_chat_template(messages, chat_template=template, return_dict=True)["input_ids"]
        assert ids == expected


class TestImageTokens:
    def test_processor_and_model_agree(self, processor, model):
        assert processor.num_image_tokens == model.config.num_image_tokens
        assert processor.image_token_id == model.config.image_token_id
        features = model.get_image_features(torch.zeros(1, 3, model.config.image_size, model.config.image_size))
        assert len(features.pooler_output[0]) == processor.num_image_tokens

    @pytest.mark.parametrize(
        ("text", "num_images"), [("<image>", 2), ("<image><image>", 1), ("Hi", 1), ("<image>", 0)]
    )
    def test_numbers_of_images_and_image_tokens_must_match(self, text, num_images, processor):
        images = [Image.new("RGB", (8, 8))] * num_images or None
        with pytest.raises(ValueError, match=f"Got {num_images} images but {text.count('<image>')} '<image>' tokens"):
            processor(images=images, text=text)

    @pytest.mark.parametrize("none", [[], None])
    def test_samples_with_zero_one_and_two_images(self, none, processor):
        image = Image.new("RGB", (30, 20))
        text = ["Hi", "<image>What?", "<image><image>Both?"]
        inputs = processor(images=[none, [image], [image, image]], text=text, padding=True, return_tensors="pt")
        counts = (inputs["input_ids"] == processor.image_token_id).sum(-1)
        assert counts.tolist() == [0, processor.num_image_tokens, 2 * processor.num_image_tokens]
        assert inputs["pixel_values"].shape[0] == 3
        assert inputs["attention_mask"][0, 0] == 0  # padded on the left

    @pytest.mark.parametrize("num_images", [[1, 1], [0, 2], [2], [2, 0, 0]])
    def test_numbers_of_each_sample_must_match(self, num_images, processor):
        images = [[Image.new("RGB", (8, 8))] * number for number in num_images]
        text = ["<image><image>x", "y"]
        with pytest.raises(ValueError, match="tokens in the prompts should be the same as the number of ") as error:
            processor(images=images, text=text)
        assert f"{num_images} per sample" in str(error.value)

    @pytest.mark.parametrize("images", [[[]], [], [[], []], [None, []]])
    def test_samples_without_images_have_no_pixel_values(self, images, processor):
        text = ["Hi"] * max(len(images), 1)
        assert "pixel_values" not in processor(images=images, text=text, return_tensors="pt")

    @pytest.mark.parametrize("size", [(1, 1), (10_000, 10_000), (7, 3000)])
    def test_number_for_serving_engines_equals_the_real_one(self, size, processor):
        counts = processor._get_num_multimodal_tokens(image_sizes=[size, (5, 5)])
        assert counts["num_image_tokens"] == [processor.num_image_tokens] * 2
        assert counts["num_image_patches"] == [1, 1]
        if max(size) < 10_000:
            image = Image.fromarray(np.zeros((*size, 3), np.uint8))
            ids = processor(images=image, text="<image>")["input_ids"][0]
            assert ids.count(processor.image_token_id) == processor.num_image_tokens

    def test_mm_token_type_ids(self, processor):
        image = Image.new("RGB", (8, 8))
        inputs = processor(images=image, text="A<image>B", return_mm_token_type_ids=True)
        types = [int(token == processor.image_token_id) for token in inputs["input_ids"][0]]
        assert inputs["mm_token_type_ids"][0] == types

    def test_truncating_an_image_is_an_error(self, converted):
        processor = AutoProcessor.from_pretrained(converted)  # its own: tokenizers remember how they truncated last
        with pytest.raises(ValueError, match="truncation"):
            processor(images=Image.new("RGB", (8, 8)), text="<image>Hi", truncation=True, max_length=5)


class TestSaveAndLoad:
    def test_auto_processor_returns_florence_vl_with_the_pillow_backend(self, converted):
        processor = AutoProcessor.from_pretrained(converted)
        assert type(processor) is FlorenceVLProcessor
        assert type(processor.image_processor) is LlavaImageProcessorPil

    def test_round_trip(self, processor, golden, tmp_path):
        processor.save_pretrained(tmp_path)
        loaded = AutoProcessor.from_pretrained(tmp_path)
        expected = {name: value for name, value in processor.to_dict().items() if name != "auto_map"}
        assert loaded.to_dict() == expected
        messages = golden.messages(0)
        kwargs = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        expected = processor.apply_chat_template(messages, **kwargs)
        assert_close(dict(loaded.apply_chat_template(messages, **kwargs)), dict(expected))

    def test_settings_given_when_loading(self, converted):
        loaded = AutoProcessor.from_pretrained(converted, num_image_tokens=2)
        assert loaded.num_image_tokens == 2
        assert loaded(images=Image.new("RGB", (8, 8)), text="<image>").input_ids[0].count(loaded.image_token_id) == 2

    def test_tokenizer_has_the_image_token(self, processor, tmp_path):
        assert processor.tokenizer.image_token == "<image>"
        processor.tokenizer.save_pretrained(tmp_path)
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        assert (loaded.image_token, loaded.image_token_id) == ("<image>", processor.image_token_id)
        assert len(loaded) == len(processor.tokenizer)

    def test_replaces_the_torchvision_backend_by_pillow(self, processor, monkeypatch):
        # Where torchvision is installed, the class of this name is another one, whose pixels differ.
        with_torchvision = type("LlavaImageProcessor", (LlavaImageProcessorPil,), {})
        monkeypatch.setattr(transformers, "LlavaImageProcessor", with_torchvision)
        image_processor = with_torchvision(**processor.image_processor.to_dict())
        pinned = FlorenceVLProcessor(image_processor, processor.tokenizer, processor.num_image_tokens)
        assert type(pinned.image_processor) is LlavaImageProcessorPil
        assert pinned.image_processor.size == processor.image_processor.size

    def test_tokenizer_without_the_image_token_is_an_error(self, golden, processor):
        tokenizer = load_original_tokenizer(golden.checkpoint)
        with pytest.raises(ValueError, match="has no token '<photo>'"):
            FlorenceVLProcessor(processor.image_processor, tokenizer, image_token="<photo>")
