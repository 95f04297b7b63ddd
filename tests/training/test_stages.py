# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import logging
from typing import get_args

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from florence_vl_hf.training import STAGES, lora_config, register_training_hook, set_trainable
from florence_vl_hf.training.stages import PARTS, Stage, part_of

from ..conftest import enable_checkpointing, tiny_config, tiny_inputs, tiny_model


# Written out, and not taken from the code.
TRAINED = {
    "pretrain": {"vision_tower", "multi_modal_projector", "language_model", "lm_head"},
    "finetune": {"multi_modal_projector", "language_model", "lm_head"},
    "projector": {"multi_modal_projector"},
    "language_model": {"language_model", "lm_head"},
    "vision": {"vision_tower", "multi_modal_projector"},
}


def children(model) -> dict[str, torch.nn.Module]:
    names = ("vision_tower", "multi_modal_projector", "language_model")
    return {**{name: getattr(model.model, name) for name in names}, "lm_head": model.lm_head}


def loss_of(model, images_per_sample=(1, 0)) -> torch.Tensor:
    inputs = tiny_inputs(model.config, list(images_per_sample))
    return model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] == 98, -100)).loss


def prepared(stage: str, **changes):
    """A model in training mode, as `Trainer` puts it there before each step."""
    model = tiny_model(**changes)
    set_trainable(model, stage)
    return model.train()


def count_encoded(model) -> list[int]:
    """The number of images of each call of the vision tower, from now on."""
    counts: list[int] = []
    model.model.vision_tower.register_forward_pre_hook(lambda _, args: counts.append(len(args[0])))
    return counts


@pytest.mark.parametrize("stage", TRAINED)
def test_gradients_reach_exactly_what_is_trained(stage):
    model = tiny_model().train()
    counted = set_trainable(model, stage)
    loss_of(model).backward()
    for name, part in children(model).items():
        reached = {parameter.grad is not None for parameter in part.parameters()}
        assert reached == {name in TRAINED[stage]}, name
    assert sum(counted.values()) == sum(p.numel() for p in model.parameters() if p.grad is not None)


def test_stages_are_all_tested():
    assert set(STAGES) == set(TRAINED) == set(get_args(Stage))


def test_unknown_stage_lists_the_known():
    with pytest.raises(ValueError, match="'finetuning'.*'pretrain', 'finetune', 'projector'"):
        set_trainable(tiny_model(), "finetuning")


def test_trained_parts_are_logged(caplog):
    with caplog.at_level(logging.INFO, logger="florence_vl_hf"):
        set_trainable(tiny_model(), "projector")
    assert "vision_tower frozen; projector trained" in caplog.text
    assert "language_model frozen" in caplog.text


class TestFrozenParts:
    def test_go_to_evaluation_mode(self):
        model = tiny_model().train()
        set_trainable(model, "finetune")
        assert not any(module.training for module in model.model.vision_tower.modules())
        assert all(module.training for module in model.model.multi_modal_projector.modules())
        assert all(module.training for module in model.model.language_model.modules())

    def test_a_model_in_evaluation_mode_stays_there(self):
        model = tiny_model()
        set_trainable(model, "finetune")
        assert not any(module.training for module in model.modules())

    def test_unfrozen_parts_go_back_to_training_mode(self):
        model = tiny_model().train()
        set_trainable(model, "projector")
        set_trainable(model, "pretrain")
        assert all(module.training for module in model.modules())

    def test_tower_keeps_no_activations(self):
        model = tiny_model().train()
        set_trainable(model, "projector")
        # As in Trainer and peft with checkpointing: the embeddings of the tower's prompts require gradients too.
        model.enable_input_require_grads()
        features = model.get_image_features(tiny_inputs(model.config, [1])["pixel_values"])
        assert not features.last_hidden_state.requires_grad
        assert features.pooler_output[0].requires_grad

    def test_gradients_of_the_pixels_still_pass(self):
        model = tiny_model()
        set_trainable(model, "projector")
        pixels = tiny_inputs(model.config, [1])["pixel_values"].requires_grad_()
        model.get_image_features(pixels).pooler_output[0].sum().backward()
        assert pixels.grad.abs().sum() > 0


def test_an_encoder_that_reads_no_prompt_is_frozen():
    model = tiny_model(fusion_features=["image"]).train()
    set_trainable(model, "pretrain")
    loss_of(model).backward()
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert unused == []


def test_names_behind_wrappers_belong_to_their_part():
    assert part_of("base_model.model.model.multi_modal_projector.modules_to_save.default.layers.0.bias") == "projector"
    assert part_of("module.model.language_model.layers.0.mlp.up_proj.lora_A.default.weight") == "language_model"
    assert {part_of(name) for name, _ in tiny_model().named_parameters()} == set(PARTS)
    with pytest.raises(ValueError, match="other.weight"):
        part_of("other.weight")


class TestTrainingHook:
    @pytest.mark.parametrize("images_per_sample", [(1, 0), (0, 0)])
    def test_stay_in_evaluation_mode(self, images_per_sample):
        model = prepared("finetune")
        for _ in range(2):
            loss_of(model, images_per_sample)
            assert not any(module.training for module in model.model.vision_tower.modules())
            assert all(module.training for module in model.model.multi_modal_projector.modules())
            assert all(module.training for module in model.model.language_model.modules())
            model.train()
        loss_of(model.eval(), images_per_sample)
        assert not any(module.training for module in model.modules())

    def test_below_lora(self):
        peft = pytest.importorskip("peft")
        model = tiny_model()
        model = peft.get_peft_model(model, lora_config(model, rank=4, train_projector=True))
        register_training_hook(model)
        loss_of(model.train())
        inner = model.get_base_model().model
        assert not any(module.training for module in inner.vision_tower.modules())
        assert inner.multi_modal_projector.training
        assert all(module.training for module in inner.language_model.modules())

    def test_have_no_dropout(self):
        settings = tiny_config().to_dict()
        settings["vision_config"]["text_config"]["dropout"] = 0.5
        model = tiny_model(vision_config=settings["vision_config"])
        register_training_hook(model)
        losses = [loss_of(model.train()).item() for _ in range(2)]
        assert losses[0] != losses[1]
        set_trainable(model, "finetune")
        losses = [loss_of(model.train()).item() for _ in range(2)]
        assert losses[0] == losses[1]

    def test_layers_of_a_frozen_language_model_are_checkpointed(self):
        model = prepared("projector")
        loss_of(model).backward()
        expected = [parameter.grad.clone() for parameter in model.model.multi_modal_projector.parameters()]
        model.zero_grad()

        enable_checkpointing(model)
        layers = [m for m in model.model.language_model.modules() if isinstance(m, GradientCheckpointingLayer)]
        num_runs = []
        for layer in layers:
            layer.mlp.register_forward_pre_hook(lambda *_: num_runs.append(1))
        loss_of(model.train()).backward()
        assert len(num_runs) == 2 * len(layers)
        assert not any(layer.mlp.training for layer in layers)
        actual = [parameter.grad for parameter in model.model.multi_modal_projector.parameters()]
        torch.testing.assert_close(actual, expected)


class TestBatchesWithoutImages:
    @pytest.mark.parametrize("stage", ["pretrain", "finetune", "projector", "vision"])
    def test_give_zero_gradients_to_vision_tower_and_projector(self, stage):
        model = prepared(stage)
        loss_of(model, (0, 0)).backward()
        for part in (model.model.vision_tower, model.model.multi_modal_projector):
            trained = [parameter for parameter in part.parameters() if parameter.requires_grad]
            assert all((parameter.grad == 0).all() for parameter in trained)

    def test_change_neither_the_loss_nor_other_gradients(self):
        expected, found = tiny_model().train(), prepared("pretrain")
        losses = [loss_of(model, (0, 0)) for model in (expected, found)]
        torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=0)
        for loss in losses:
            loss.backward()
        for (name, parameter), reference in zip(found.named_parameters(), expected.parameters(), strict=True):
            if "language_model" in name or "lm_head" in name:
                torch.testing.assert_close(parameter.grad, reference.grad, rtol=0, atol=0)

    def test_of_embeddings(self):
        model = prepared("pretrain")
        inputs = tiny_inputs(model.config, [0, 0])
        expected = model(**inputs).logits
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
        outputs = model(**inputs)
        torch.testing.assert_close(outputs.logits, expected)
        outputs.logits.sum().backward()
        assert all(parameter.grad is not None for parameter in model.model.multi_modal_projector.parameters())

    def test_encode_an_image_only_where_gradients_are_needed(self):
        model = prepared("projector")
        # Registered once, however often.
        register_training_hook(model)
        counts = count_encoded(model)
        loss_of(model, (0, 0))
        loss_of(model, (2, 0))
        assert counts == [1, 2]
        loss_of(model.eval(), (0, 0))
        set_trainable(model.train(), "language_model")
        loss_of(model, (0, 0))
        assert counts == [1, 2]

    def test_generation_is_as_without_the_hook(self):
        model = tiny_model()
        inputs = tiny_inputs(model.config, [1, 0])
        expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        register_training_hook(model)
        counts = count_encoded(model)
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), expected)
        assert counts == [1]


def test_registered_again_it_runs_after_hooks_of_wrappers():
    """DeepSpeed registers its hooks when it wraps a model, and they must see the model before its vision tower."""
    model = prepared("pretrain")
    order = []
    model.model.register_forward_pre_hook(lambda *_: order.append("model"))
    model.model.vision_tower.register_forward_pre_hook(lambda *_: order.append("vision tower"))
    register_training_hook(model)
    loss_of(model, (0, 0))
    assert order == ["model", "vision tower"]


def test_another_model():
    with pytest.raises(ValueError, match="Linear, expected a Florence-VL"):
        register_training_hook(torch.nn.Linear(1, 1))


def test_set_trainable_registers_the_hook_for_any_trainer():
    model = tiny_model()
    set_trainable(model, "finetune")
    loss_of(model.train())
    assert not any(module.training for module in model.model.vision_tower.modules())
