# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import datasets
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText

from florence_vl_hf.training import (
    FlorenceVLCollator,
    FlorenceVLTrainer,
    FlorenceVLTrainingArguments,
    load_conversations,
    set_trainable,
    to_messages,
)
from florence_vl_hf.training.stages import part_of
from florence_vl_hf.training.trainer import TrainingError, exact_match


@pytest.fixture
def samples(golden, data_file):
    return load_conversations(data_file, golden.folder / "images")


def make_trainer(converted, processor, output_dir, samples, stage="finetune", on_error="raise", **settings):
    model = AutoModelForImageTextToText.from_pretrained(converted, dtype=torch.float32)
    set_trainable(model, stage)
    args = FlorenceVLTrainingArguments(
        output_dir=str(output_dir), use_cpu=True, disable_tqdm=True, **{"save_strategy": "no", **settings}
    )
    collator = FlorenceVLCollator(processor, max_length=2048, on_error=on_error)
    return FlorenceVLTrainer(model, args, collator, train_dataset=samples, eval_dataset=samples)


class TestLearningRates:
    def test_of_each_part(self, converted, processor, tmp_path, samples):
        trainer = make_trainer(
            converted,
            processor,
            tmp_path,
            samples,
            stage="pretrain",
            learning_rate=1e-5,
            projector_learning_rate=1e-3,
            vision_tower_learning_rate=1e-6,
        )
        optimizer = trainer.create_optimizer()
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        expected = {"vision_tower": 1e-6, "projector": 1e-3, "language_model": 1e-5}
        for name, parameter in trainer.model.named_parameters():
            assert rates.pop(id(parameter)) == expected[part_of(name)], name
        assert not rates

    def test_weight_decay_applies_to_the_same_parameters(self, converted, processor, tmp_path, samples):
        """Grouped by part or not."""
        decays = []
        for rates in ({}, {"projector_learning_rate": 1e-3}):
            trainer = make_trainer(converted, processor, tmp_path, samples, weight_decay=0.1, **rates)
            names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
            groups = trainer.create_optimizer().param_groups
            decays.append({names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]})
        assert decays[0] == decays[1] and set(decays[0].values()) == {0.0, 0.1}
        # Frozen parameters are in no group.
        assert not any("vision_tower" in name for name in decays[1])

    def test_a_rate_of_zero_is_used(self, converted, processor, tmp_path, samples):
        trainer = make_trainer(converted, processor, tmp_path, samples, projector_learning_rate=0.0)
        assert {group["lr"] for group in trainer.create_optimizer().param_groups} == {0.0, 5e-5}

    def test_only_the_part_with_a_rate_changes(self, converted, processor, tmp_path, samples):
        trainer = make_trainer(
            converted, processor, tmp_path, samples, learning_rate=0.0, projector_learning_rate=1e-3, max_steps=2
        )
        before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
        trainer.train()
        moved = {part_of(name) for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
        assert moved == {"projector"}


@pytest.mark.slow
def test_four_batches_of_two_are_one_of_eight(converted, processor, tmp_path, samples):
    # The samples have answers of different lengths, one or two turns, with and without images: the mean of means is
    # not their mean. Plain gradient descent does not amplify differences.
    trained, losses = [], []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        trainer = make_trainer(
            converted,
            processor,
            tmp_path,
            samples,
            stage="pretrain",
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=3,
            optim="sgd",
            learning_rate=1e-3,
            max_grad_norm=0.0,
            logging_steps=1,
        )
        # Dropout and stochastic depth depend on the batch size.
        for module in trainer.model.modules():
            for name in ("dropout", "drop_prob", "attention_dropout", "activation_dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        trainer.train()
        trained.append({name: parameter.detach() for name, parameter in trainer.model.named_parameters()})
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    assert_close(trained[0], trained[1], rtol=1e-4, atol=1e-6)


def test_frozen_parts_have_no_dropout_in_a_step(converted, processor, tmp_path, samples):
    trainer = make_trainer(converted, processor, tmp_path, samples, max_steps=1)
    modes = []
    tower = trainer.model.model.vision_tower
    tower.register_forward_pre_hook(lambda *_: modes.append({module.training for module in tower.modules()}))
    trainer.train()
    assert modes == [{False}]


class TestLogits:
    def test_are_computed_only_where_something_is_learned(self, converted, processor, tmp_path, samples):
        trainer = make_trainer(converted, processor, tmp_path, samples)
        batch = trainer.data_collator([samples[i] for i in range(4)])
        num_labelled = int(batch["labels"].ne(-100).any(dim=0).sum())
        assert 0 < num_labelled < batch["labels"].shape[1] - processor.num_image_tokens
        shapes = []
        trainer.model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape[:2]))
        trainer.model.eval()

        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}
        trainer.model.zero_grad()
        complete = trainer.model(**batch).loss
        complete.backward()
        expected = {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}
        assert shapes == [(4, num_labelled), tuple(batch["labels"].shape)]
        assert_close(loss, complete)
        assert_close(gradients, expected, rtol=1e-4, atol=1e-6)

    def test_are_computed_everywhere_if_outputs_are_requested(self, converted, processor, tmp_path, samples):
        trainer = make_trainer(converted, processor, tmp_path, samples)
        batch = trainer.data_collator([samples[0]])
        _, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        assert outputs.logits.shape[1] == batch["labels"].shape[1]


class TestEvaluation:
    def separate_answers(self, trainer, samples) -> list[str]:
        """Answers of the model to one sample at a time, without labels or padding."""
        answers = []
        for sample in samples:
            inputs = trainer.processing_class.apply_chat_template(
                to_messages(sample)[:-1],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
            output_ids = trainer.model.generate(**inputs, max_new_tokens=5, do_sample=False)
            new_ids = output_ids[0, inputs["input_ids"].shape[1] :]
            answers.append(trainer.processing_class.decode(new_ids, skip_special_tokens=True))
        return answers

    @pytest.mark.parametrize("batch_size", [3, 8])
    def test_answers_are_those_of_single_questions(self, converted, processor, tmp_path, samples, batch_size):
        settings = {"predict_with_generate": True, "generation_max_new_tokens": 5}
        trainer = make_trainer(
            converted, processor, tmp_path, samples, per_device_eval_batch_size=batch_size, **settings
        )
        expected = self.separate_answers(trainer, samples)
        measured = []

        def answered_as_expected(answers: list[str], references: list[str]) -> dict[str, float]:
            measured.append((answers, references))
            return exact_match(answers, [*expected[:-2], "no", "no"])

        trainer.answer_metric = answered_as_expected
        metrics = trainer.evaluate()
        assert measured == [(expected, [sample["messages"][-1]["content"][0]["text"] for sample in samples])]
        assert metrics["eval_exact_match"] == 0.75
        assert metrics["eval_loss"] > 0
        assert trainer.state.log_history[-1]["eval_exact_match"] == 0.75

    def test_broken_samples_have_no_answer(self, converted, processor, tmp_path, samples):
        broken = samples.select([0, 1]).map(lambda sample: {"images": ["nowhere.png"]})
        samples = datasets.concatenate_datasets([broken, samples.select([2]), broken])
        settings = {"predict_with_generate": True, "generation_max_new_tokens": 2, "per_device_eval_batch_size": 2}
        trainer = make_trainer(converted, processor, tmp_path, samples, on_error="skip", **settings)
        trainer.answer_metric = lambda answers, references: {"answers": len(answers), "references": len(references)}
        metrics = trainer.evaluate()
        assert (metrics["eval_answers"], metrics["eval_references"]) == (1, 1)
        assert trainer.total_skipped() == 4

    @pytest.mark.parametrize("returned", [0.5, None, {"accuracy": "high"}, {"accuracy": {"a": 1}}])
    def test_a_metric_without_a_dict_of_floats(self, converted, processor, tmp_path, samples, returned):
        trainer = make_trainer(
            converted,
            processor,
            tmp_path,
            samples.select([0]),
            predict_with_generate=True,
            generation_max_new_tokens=2,
        )
        trainer.answer_metric = lambda answers, references: returned
        with pytest.raises(ValueError, match="expected a dict of floats"):
            trainer.evaluate()
        trainer.answer_metric = lambda answers, references: {"accuracy": torch.tensor(0.5)}
        assert trainer.evaluate()["eval_accuracy"] == 0.5

    def test_without_predict_with_generate(self, converted, processor, tmp_path, samples):
        measured = make_trainer(converted, processor, tmp_path, samples).evaluate()
        assert "eval_loss" in measured and "eval_exact_match" not in measured


def test_exact_match_compares_complete_answers():
    assert exact_match(["A fox.", " A fox.\n", "a fox.", ""], ["A fox."] * 4) == {"exact_match": 0.5}


@pytest.fixture
def broken(samples):
    return samples.select([0, 1]).map(lambda sample: {"images": ["nowhere.png"]})


class TestBrokenSamples:
    def test_a_batch_of_broken_samples_changes_nothing(self, converted, processor, tmp_path, samples, broken):
        mixed = datasets.concatenate_datasets([broken, samples.select([2])])
        settings = {"per_device_train_batch_size": 2, "max_steps": 1, "logging_steps": 1, "weight_decay": 0.0}
        trainer = make_trainer(
            converted, processor, tmp_path, mixed, on_error="skip", train_sampling_strategy="sequential", **settings
        )
        before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
        with pytest.raises(TrainingError, match="All samples are broken, so nothing is learned"):
            trainer.train()
        assert_close(dict(trainer.model.named_parameters()), before, rtol=0, atol=0)
        first = trainer.state.log_history[0]
        assert (first["loss"], first["skipped_samples"]) == (0.0, 2)
        assert trainer.total_skipped() == 2

    @pytest.mark.parametrize("batch_size", [1, 2, 8])
    def test_do_not_count_in_the_loss(self, converted, processor, tmp_path, samples, broken, batch_size):
        mixed = datasets.concatenate_datasets([broken, samples.select([2, 3]), broken, samples.select([4])])
        settings = {"per_device_eval_batch_size": batch_size, "on_error": "skip"}
        trainer = make_trainer(converted, processor, tmp_path, mixed, **settings)
        losses = [trainer.model(**trainer.data_collator([samples[i]])).loss for i in (2, 3, 4)]
        assert_close(trainer.evaluate()["eval_loss"], torch.stack(losses).mean().item(), rtol=1e-5, atol=0)

    def test_have_no_result(self, converted, processor, tmp_path, broken, caplog):
        settings = {"predict_with_generate": True, "generation_max_new_tokens": 2}
        trainer = make_trainer(converted, processor, tmp_path, broken, on_error="skip", **settings)
        assert not {"eval_loss", "eval_exact_match"} & trainer.evaluate().keys()
        assert "so there is no result" in caplog.text


class TestNothingLearned:
    def test_no_checkpoint(self, converted, processor, tmp_path, samples, broken):
        mixed = datasets.concatenate_datasets([broken, samples.select([2])])
        settings = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 1, "max_steps": 3}
        trainer = make_trainer(
            converted, processor, tmp_path, mixed, on_error="skip", train_sampling_strategy="sequential", **settings
        )
        trainer.train()
        assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]

    @pytest.mark.parametrize("settings", [{}, {"learning_rate": 1e30, "max_grad_norm": 0.0, "optim": "sgd"}])
    def test_loss_that_is_not_finite(self, converted, processor, tmp_path, samples, settings):
        settings = {"save_strategy": "steps", "save_steps": 4, "per_device_train_batch_size": 2, **settings}
        trainer = make_trainer(converted, processor, tmp_path, samples, **settings)
        is_lost = "learning_rate" not in settings
        if is_lost:
            torch.nn.init.constant_(trainer.model.lm_head.weight, torch.nan)
        with pytest.raises(TrainingError, match="not finite at step 0" if is_lost else "not finite at step 4"):
            trainer.train()
        assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.slow
def test_grouping_separates_samples_with_and_without_images(converted, processor, tmp_path, samples):
    grouped = datasets.concatenate_datasets([samples] * 50)
    has_images = [bool(images) for images in grouped["images"]]
    trainer = make_trainer(
        converted,
        processor,
        tmp_path,
        grouped,
        train_sampling_strategy="group_by_length",
        per_device_train_batch_size=2,
    )
    order = [has_images[i] for i in trainer._get_train_sampler()]
    kinds = [set(order[start : start + 2]) for start in range(0, len(order), 2)]
    # The sampler sorts 50 batches at a time, and of these at most one has samples of both kinds.
    assert len(kinds) == 200 and sum(len(kind) == 2 for kind in kinds) <= 4
