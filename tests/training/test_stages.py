# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import logging

import pytest
import torch

from florence_vl_hf.training import STAGES, set_trainable
from florence_vl_hf.training.stages import PARTS, part_of

from ..conftest import tiny_inputs, tiny_model


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


def backward(model, images_per_sample=(1, 0)) -> None:
    inputs = tiny_inputs(model.config, list(images_per_sample))
    model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] == 98, -100)).loss.backward()


@pytest.mark.parametrize("stage", TRAINED)
def test_gradients_reach_exactly_what_is_trained(stage):
    model = tiny_model().train()
    counted = set_trainable(model, stage)
    backward(model)
    for name, part in children(model).items():
        reached = {parameter.grad is not None for parameter in part.parameters()}
        assert reached == {name in TRAINED[stage]}, name
    assert sum(counted.values()) == sum(p.numel() for p in model.parameters() if p.grad is not None)


def test_stages_are_all_tested():
    assert set(STAGES) == set(TRAINED)


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
    backward(model)
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert unused == []


def test_names_behind_wrappers_belong_to_their_part():
    assert part_of("base_model.model.model.multi_modal_projector.modules_to_save.default.layers.0.bias") == "projector"
    assert part_of("module.model.language_model.layers.0.mlp.up_proj.lora_A.default.weight") == "language_model"
    assert {part_of(name) for name, _ in tiny_model().named_parameters()} == set(PARTS)
    with pytest.raises(ValueError, match="other.weight"):
        part_of("other.weight")
