# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import copy

import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torch.utils.data import DataLoader

from florence_vl_hf.processing import load_chat_template
from florence_vl_hf.training import FlorenceVLCollator, SampleError
from florence_vl_hf.training.samples import Problem, read_sample

from ..conftest import collapse


def sample(golden, num_images: int = 1, answer: str = "A fox.", image: str = "odd.jpg", **more) -> dict:
    content = [{"type": "image"}] * num_images + [{"type": "text", "text": "What is shown?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    images = [str(golden.image_path(image))] * num_images
    return {"id": f"{num_images} images", "messages": messages, "images": images, **more}


def sample_of(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def collapsed_labels(batch, index: int, processor) -> list[int]:
    ids, labels, mask = (batch[name][index] for name in ("input_ids", "labels", "attention_mask"))
    length = int(mask.sum())
    return collapse(ids[:length].tolist(), labels[:length].tolist(), processor.image_token_id)


class TestAgainstTheOriginal:
    def test_labels(self, golden, processor):
        dialogs = golden.reference["dialogs"]
        samples = [
            {"id": n, "conversations": dialog["conversations"], "image": str(golden.image_path("odd.jpg"))}
            for n, dialog in enumerate(dialogs)
        ]
        for example in samples:
            if not dialogs[example["id"]]["has_image"]:
                del example["image"]
        batch = FlorenceVLCollator(processor, max_length=2048)(samples)
        learned = [n for n, dialog in enumerate(dialogs) if set(dialog["train_labels"]) != {-100}]
        assert len(learned) >= 5
        for n in learned:
            assert collapsed_labels(batch, n, processor) == dialogs[n]["train_labels"]

    def test_all_answers_are_learned_where_the_original_learns_none(self, golden, processor):
        [(n, dialog)] = [(n, d) for n, d in enumerate(golden.reference["dialogs"]) if len(d["conversations"]) == 4]
        example = {"id": n, "conversations": dialog["conversations"], "image": str(golden.image_path("odd.jpg"))}
        labels = FlorenceVLCollator(processor)([example])["labels"][0]
        learned = processor.tokenizer.decode(labels[labels != -100])
        for turn in dialog["conversations"]:
            assert (turn["value"].strip() in learned) == (turn["from"] == "gpt")

    def test_captions(self, golden, processor):
        processor = copy.deepcopy(processor)
        processor.chat_template = load_chat_template("plain", processor.tokenizer, processor.image_token)
        for example in golden.reference["plain"]:
            conversations = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": example["caption"]}]
            image = str(golden.image_path("odd.jpg"))
            batch = FlorenceVLCollator(processor)([{"id": 0, "conversations": conversations, "image": image}])
            assert collapsed_labels(batch, 0, processor) == example["train_labels"]


class TestBatch:
    def test_samples_of_all_kinds_are_padded_on_the_right(self, golden, processor):
        samples = [sample(golden, 0), sample(golden, 2, image="wide.png"), sample(golden, 1)]
        collate = FlorenceVLCollator(processor)
        batch = collate(samples)
        assert batch["pixel_values"].shape[0] == 3
        alone = [collate([example]) for example in samples]
        for n, single in enumerate(alone):
            length = single["input_ids"].shape[1]
            for name, padding in (("input_ids", processor.tokenizer.pad_token_id), ("labels", -100)):
                assert_close(batch[name][n, :length], single[name][0])
                assert (batch[name][n, length:] == padding).all()
            assert batch["attention_mask"][n].tolist() == [1] * length + [0] * (batch["labels"].shape[1] - length)
        assert_close(batch["pixel_values"], torch.cat([alone[1]["pixel_values"], alone[2]["pixel_values"]]))

    def test_text_alone_has_no_pixel_values(self, golden, processor):
        assert "pixel_values" not in FlorenceVLCollator(processor)([sample(golden, 0), sample(golden, 0)])

    def test_the_loss_of_a_batch_is_the_sum_of_its_samples(self, golden, processor, model):
        samples = [sample(golden, 0), sample(golden, 2), sample(golden, 1, answer="A much longer answer about a fox.")]
        collate = FlorenceVLCollator(processor)
        with torch.no_grad():
            total = model(**collate(samples), num_items_in_batch=1).loss
            alone = [model(**collate([example]), num_items_in_batch=1).loss for example in samples]
        assert_close(total, sum(alone), rtol=1e-5, atol=1e-4)


class TestMaxLength:
    def test_text_is_truncated(self, golden, processor):
        example = sample(golden, 1, answer="fox " * 40)
        complete = FlorenceVLCollator(processor)([example])
        length = complete["input_ids"].shape[1] - 7
        truncated = FlorenceVLCollator(processor, max_length=length)([example])
        for name in ("input_ids", "attention_mask", "labels"):
            assert_close(truncated[name], complete[name][:, :length])

    def test_an_image_is_never_truncated(self, golden, processor):
        example = sample(golden, 2)
        ids = FlorenceVLCollator(processor)([example])["input_ids"][0]
        end = int((ids == processor.image_token_id).nonzero()[-1]) + 1
        fits = FlorenceVLCollator(processor, max_length=end + 40)([example])
        assert (fits["input_ids"] == processor.image_token_id).sum() == 2 * processor.num_image_tokens
        with pytest.raises(SampleError, match="'2 images'.*do not fit.*max_length"):
            FlorenceVLCollator(processor, max_length=end - 1, on_error="raise")([example])

    def test_a_sample_whose_answer_is_truncated_is_broken(self, golden, processor):
        example = sample(golden, 1)
        labels = FlorenceVLCollator(processor)([example])["labels"][0]
        start = int((labels != -100).nonzero()[0])
        assert FlorenceVLCollator(processor, max_length=start + 1)([example])["labels"][0, -1] != -100
        with pytest.raises(SampleError, match="No answer begins within max_length"):
            FlorenceVLCollator(processor, max_length=start, on_error="raise")([example])

    @pytest.mark.parametrize("template", ["llama3", "phi3", "vicuna"])
    @pytest.mark.parametrize("text", ["word ", "é", "\n", "-" * 40 + " 😀"])
    def test_shortened_text_gives_the_same_batch(self, golden, processor, template, text):
        processor = copy.deepcopy(processor)
        processor.chat_template = load_chat_template(template, processor.tokenizer)
        example = sample(golden, 1, answer="A" + text * (20_000 // len(text)))
        collate = FlorenceVLCollator(processor, max_length=400)
        complete = FlorenceVLCollator(processor)([example])
        num_characters = sum(
            len(item["text"] or "") for turn in collate.shorten(read_sample(example)[0]) for item in turn["content"]
        )
        longest = max(map(len, processor.tokenizer.get_vocab()))
        assert num_characters <= collate.max_length * longest
        shortened = collate([example])
        for name in ("input_ids", "attention_mask", "labels"):
            assert_close(shortened[name], complete[name][:, :400])

    def test_long_conversations_are_shortened(self, processor):
        messages = [{"role": role, "content": "Hi"} for role in ("user", "assistant")] * 5000
        collate = FlorenceVLCollator(processor, max_length=300)
        assert len(collate.shorten(read_sample({"messages": messages})[0])) <= 300
        assert collate([{"messages": messages}])["input_ids"].shape == (1, 300)

    def test_images_that_do_not_fit_are_not_opened(self, processor):
        messages = sample_of("<image>" * 1000, "Many.")
        with pytest.raises(SampleError, match="do not fit"):
            collate = FlorenceVLCollator(processor, max_length=2048, on_error="raise")
            collate([{"messages": messages, "images": ["nowhere.png"] * 1000}])


class TestLimits:
    def test_max_image_side(self, golden, processor):
        example = sample(golden, 1)
        with Image.open(golden.image_path("odd.jpg")) as image:
            side = max(image.size)
        FlorenceVLCollator(processor, on_error="raise", max_image_side=side)([example])
        with pytest.raises(SampleError, match="max_image_side"):
            FlorenceVLCollator(processor, on_error="raise", max_image_side=side - 1)([example])


class TestBrokenSamples:
    def broken(self, golden) -> dict:
        return sample(golden, 1) | {"id": "lost", "images": ["nowhere.png"]}

    def test_raise(self, golden, processor):
        with pytest.raises(SampleError, match="'lost'.*nowhere.png"):
            FlorenceVLCollator(processor, on_error="raise")([sample(golden, 1), self.broken(golden)])

    def test_raise_in_a_worker(self, golden, processor):
        loader = DataLoader(
            [self.broken(golden)], num_workers=1, collate_fn=FlorenceVLCollator(processor, on_error="raise")
        )
        with pytest.raises(SampleError) as caught:
            list(loader)
        assert caught.value.problem is Problem.MISSING_IMAGE
        assert str(caught.value).startswith("Sample 'lost': There is no image")

    def test_skip_counts(self, golden, processor, caplog):
        collate = FlorenceVLCollator(processor)
        batch = collate([self.broken(golden), sample(golden, 1), self.broken(golden)])
        assert_close(batch["input_ids"], FlorenceVLCollator(processor)([sample(golden, 1)])["input_ids"])
        assert collate.num_skipped == 2
        assert "'lost'" in caplog.text

    def test_samples_skipped_by_workers_are_counted(self, golden, processor):
        collate = FlorenceVLCollator(processor)
        samples = [self.broken(golden), sample(golden, 0)] * 4
        batches = list(DataLoader(samples, batch_size=2, num_workers=2, collate_fn=collate))
        assert len(batches) == 4
        assert collate.num_skipped == 4

    def test_a_batch_of_broken_samples_has_no_labels(self, golden, processor, model):
        batch = FlorenceVLCollator(processor)([self.broken(golden)])
        assert (batch["labels"] == -100).all()
        assert model(**batch, num_items_in_batch=1).loss == 0
