# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Planned memory against measured memory, against counts of a real model, and against the documented table."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from florence_vl_hf import FlorenceVLConfig, FlorenceVLForConditionalGeneration
from florence_vl_hf.planning import TrainingSetup, format_table, plan_memory, published_config, read_setup
from florence_vl_hf.planning.memory import KNOWN_RUNS
from florence_vl_hf.training import RECIPES, read_recipe

from ..conftest import status, tiny_config


ROOT = Path(__file__).parent.parent.parent
TINY = TrainingSetup(max_length=16, dtype="float32", mixed_precision=False)


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_train", ROOT / "benchmarks" / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small_config(benchmark: ModuleType) -> FlorenceVLConfig:
    """Return the configuration of the benchmark with fewer layers."""
    config = benchmark.small_config()
    config.vision_config.vision_config.depths = [1, 1, 1, 1]
    config.vision_config.text_config.encoder_layers = 2
    config.text_config.num_hidden_layers = 2
    return config


def num_parameters(*parts: str) -> int:
    """Count the parameters of a real model whose names contain one of `parts`."""
    model = FlorenceVLForConditionalGeneration(tiny_config())
    return sum(p.numel() for name, p in model.named_parameters() if any(part in name for part in parts or [""]))


class TestAgainstMeasurement:
    """A real step on the CPU: bytes that PyTorch's allocator reports."""

    @pytest.mark.parametrize(
        "changes",
        [
            {"stage": "pretrain", "gradient_checkpointing": True},
            {"stage": "finetune", "gradient_checkpointing": False, "batch_size": 2},
            {"stage": "finetune", "gradient_checkpointing": True, "lora_rank": 4},
        ],
        ids=lambda changes: "-".join(map(str, changes.values())),
    )
    def test_plan_is_near_the_measured_peak(self, benchmark: ModuleType, changes: dict) -> None:
        config = small_config(benchmark)
        setup = replace(TINY, max_length=128, **changes)
        measured, plan = benchmark.measure_peak(config, setup), plan_memory(config, setup)
        assert plan.total == pytest.approx(measured, rel=0.15)
        # Without weights and optimizer, which are most of the bytes and easy to count.
        lasting = plan.terms["weights"] + plan.terms["optimizer"]
        assert plan.total - lasting == pytest.approx(measured - lasting, rel=0.15)

    def test_plan_counts_attention_scores(self, benchmark: ModuleType) -> None:
        config = small_config(benchmark)
        setup = replace(TINY, stage="language_model", max_length=256, gradient_checkpointing=False)
        setups = [replace(setup, attention=attention) for attention in ("sdpa", "eager")]
        measured = [benchmark.measure_peak(config, setup) for setup in setups]
        planned = [plan_memory(config, setup).total for setup in setups]
        assert planned[1] - planned[0] == pytest.approx(measured[1] - measured[0], rel=0.15)
        assert measured[1] > measured[0]


class TestLastingTerms:
    """Terms that last through the step, against the number of parameters of a real model."""

    def test_one_gpu_in_float32(self) -> None:
        terms = plan_memory(tiny_config(), TINY).terms
        trained = num_parameters("multi_modal_projector", "language_model", "lm_head")
        assert terms["optimizer"] == 8 * trained
        assert terms["weights"] >= 4 * num_parameters()
        assert "communication" not in terms

    def test_zero2_divides_the_optimizer_and_not_the_weights(self) -> None:
        setup = replace(TINY, dtype="bfloat16", mixed_precision=True, sharding="zero2", num_gpus=2)
        terms = plan_memory(tiny_config(), setup).terms
        trained = num_parameters("multi_modal_projector", "language_model", "lm_head")
        assert terms["optimizer"] == pytest.approx(8 * trained / 2, abs=1)
        assert terms["master weights"] == pytest.approx(4 * trained / 2, abs=1)
        assert terms["weights"] >= 2 * num_parameters()

    def test_zero3_divides_the_weights_too(self) -> None:
        setups = [replace(TINY, mixed_precision=True, sharding="zero3", num_gpus=n) for n in (1, 4)]
        one, four = (plan_memory(tiny_config(), setup).terms for setup in setups)
        buffers = one["weights"] - 2 * num_parameters()
        assert 0 <= buffers < 10_000
        assert four["weights"] == pytest.approx(num_parameters() * 2 / 4 + buffers, abs=1)

    def test_fsdp2_holds_trained_weights_in_float32(self) -> None:
        setup = replace(TINY, stage="pretrain", dtype="bfloat16", mixed_precision=True, sharding="fsdp2", num_gpus=2)
        terms = plan_memory(tiny_config(), setup).terms
        assert terms["optimizer"] == pytest.approx(8 * num_parameters() / 2, abs=1)
        assert terms["weights"] >= 4 * num_parameters() / 2

    def test_ddp_keeps_buckets_beside_the_gradients(self) -> None:
        terms = plan_memory(tiny_config(), replace(TINY, sharding="ddp", num_gpus=2)).terms
        assert terms["communication"] == 4 * num_parameters("multi_modal_projector", "language_model", "lm_head")

    def test_accumulated_gradients_last_through_the_step(self) -> None:
        once = plan_memory(tiny_config(), replace(TINY, stage="pretrain", max_length=64))
        many = plan_memory(
            tiny_config(), replace(TINY, stage="pretrain", max_length=64, gradient_accumulation_steps=2)
        )
        assert many.terms["gradients"] == 4 * num_parameters()
        assert once.terms.get("gradients", 0) < many.terms["gradients"]
        assert once.total <= many.total

    def test_quantized_weights_take_half_a_byte(self) -> None:
        setup = replace(TINY, dtype="bfloat16", mixed_precision=True, lora_rank=4)
        full, quantized = (plan_memory(tiny_config(), replace(setup, bits=bits)).terms for bits in (None, 4))
        config = tiny_config().text_config
        inner = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
        linear = 2 * config.hidden_size**2 + 2 * config.hidden_size * inner
        linear = config.num_hidden_layers * (linear + 3 * config.hidden_size * config.intermediate_size)
        assert full["weights"] - quantized["weights"] == pytest.approx(linear * (2 - 0.516), rel=0.01)

    def test_all_parts_are_counted(self) -> None:
        counts = plan_memory(tiny_config(), TINY).num_parameters
        assert counts["vision_tower"] == (num_parameters("vision_tower"), 0)
        projector = num_parameters("multi_modal_projector")
        assert counts["projector"] == (projector, projector)
        assert sum(total for total, _ in counts.values()) == num_parameters()


class TestPassingTerms:
    """Terms that are allocated and freed during the step."""

    def test_checkpointing_saves_activations(self) -> None:
        config = tiny_config()
        config.text_config.num_hidden_layers = 8
        kept, recomputed = (
            plan_memory(config, replace(TINY, max_length=64, gradient_checkpointing=on)).total for on in (False, True)
        )
        assert recomputed < 0.8 * kept

    def test_a_frozen_tower_keeps_nothing(self) -> None:
        terms = {
            stage: plan_memory(
                tiny_config(), replace(TINY, stage=stage, gradient_checkpointing=False, max_length=512)
            ).terms
            for stage in ("pretrain", "finetune")
        }
        activations = {stage: plan.get("activations of the vision tower", 0) for stage, plan in terms.items()}
        assert activations["finetune"] < 0.1 * activations["pretrain"]

    def test_scaled_rotary_embeddings_do_not_matter(self) -> None:
        """Those of Phi-3.5 read the data of tensors, which fake tensors do not have."""
        config = tiny_config()
        plain = plan_memory(config, TINY).total
        size = config.text_config.hidden_size // config.text_config.num_attention_heads // 2
        config.text_config.rope_parameters |= {
            "rope_type": "longrope",
            "short_factor": [1.0] * size,
            "long_factor": [2.0] * size,
            "original_max_position_embeddings": 8,
        }
        assert plan_memory(config, TINY).total == plain

    def test_logits_are_in_float32_three_times(self) -> None:
        """Log-probabilities, their gradient, and that of the logits: a number per learned position and token."""
        config = tiny_config()
        config.text_config.vocab_size = 5000
        # A fifth of the tokens are image tokens.
        setup = replace(TINY, batch_size=2, max_length=512, stage="projector", images_per_sample=20)
        logits = plan_memory(config, setup).terms["logits and loss"]
        num_learned = 512 - 20 * config.num_image_tokens
        assert logits == pytest.approx(3 * 4 * 2 * num_learned * config.text_config.vocab_size, rel=0.05)

    def test_text_only_batches_run_the_tower_only_if_it_or_the_projector_is_trained(self) -> None:
        def activations_of_tower(stage: str, images_per_sample: int) -> int:
            setup = replace(TINY, stage=stage, images_per_sample=images_per_sample, gradient_checkpointing=False)
            return plan_memory(tiny_config(), setup).terms.get("activations of the vision tower", 0)

        assert activations_of_tower("language_model", 1) > 0
        assert activations_of_tower("language_model", 0) == 0
        # A black image is added.
        assert activations_of_tower("pretrain", 0) == activations_of_tower("pretrain", 1)


@pytest.mark.parametrize("run", ["pretrain 8B", "pretrain 3B", "finetune 8B", "finetune 3B"])
def test_the_papers_runs_are_the_recipes(run: str) -> None:
    _, known = KNOWN_RUNS[run]
    recipe = read_recipe(run.replace(" ", "_").lower())
    _, _, setup = read_setup(recipe, known.num_gpus, known.sharding)
    # Under DeepSpeed, weights are loaded in any type and then cast.
    assert replace(setup, dtype=known.dtype) == known


class TestSettings:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"sharding": "zero1"}, "zero1"),
            ({"dtype": "int8"}, "int8"),
            ({"bits": 4}, "through LoRA"),
            ({"batch_size": 0}, "batch_size"),
        ],
    )
    def test_unknown_settings_raise(self, changes: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            TrainingSetup(**changes)

    def test_images_that_exceed_max_length_raise(self) -> None:
        with pytest.raises(ValueError, match="max_length"):
            plan_memory(tiny_config(), max_length=16, images_per_sample=4)

    def test_recipe_and_accelerate_config_are_read(self) -> None:
        recipe = {
            "model_name_or_path": "somewhere",
            "train_file": "data.json",
            "stage": "finetune",
            "use_peft": True,
            "lora_r": 8,
            "load_in_4bit": True,
            "per_device_train_batch_size": 3,
            "gradient_checkpointing": True,
            "bf16": True,
            "max_length": 700,
        }
        model, changes, setup = read_setup(recipe, accelerate_config=RECIPES / "accelerate/fsdp2.yaml")
        assert (model, changes) == ("somewhere", {})
        assert (setup.sharding, setup.num_gpus, setup.batch_size, setup.max_length) == ("fsdp2", 8, 3, 700)
        assert (setup.lora_rank, setup.bits, setup.mixed_precision, setup.dtype) == (8, 4, True, "float32")

    def test_changes_of_the_fusion_are_returned(self) -> None:
        recipe = {"model_name_or_path": "somewhere", "train_file": "data.json", "fusion_features": ["image"]}
        assert read_setup(recipe)[1] == {"fusion_features": ["image"]}

    @pytest.mark.parametrize(
        ("file", "sharding"), [("ddp", "ddp"), ("deepspeed_zero2", "zero2"), ("deepspeed_zero3", "zero3")]
    )
    def test_accelerate_configs_of_the_recipes_are_supported(self, file: str, sharding: str) -> None:
        recipe = {"model_name_or_path": "somewhere", "train_file": "data.json"}
        setup = read_setup(recipe, accelerate_config=RECIPES / f"accelerate/{file}.yaml")[2]
        assert setup.sharding == sharding

    @pytest.mark.parametrize("file", ["fsdp2", RECIPES / "accelerate/fsdp2.yaml"])
    def test_accelerate_configs_are_found_by_name_and_path(self, file: str | Path) -> None:
        recipe = {"model_name_or_path": "somewhere", "train_file": "data.json"}
        setup = read_setup(recipe, accelerate_config=file)[2]
        assert (setup.sharding, setup.num_gpus) == ("fsdp2", 8)

    def test_unknown_accelerate_config_raises(self) -> None:
        recipe = {"model_name_or_path": "somewhere", "train_file": "data.json"}
        with pytest.raises(ValueError, match=r"fsdp3.*ddp, deepspeed_zero2, deepspeed_zero3, fsdp2"):
            read_setup(recipe, accelerate_config="fsdp3")

    def test_settings_for_other_machines_are_ignored(self) -> None:
        """`TrainingArguments` would look for a GPU and for DeepSpeed."""
        recipe = {"model_name_or_path": "somewhere", "train_file": "data.json", "fp16": True, "tf32": True}
        assert read_setup(recipe | {"deepspeed": "zero3.json"})[2].mixed_precision

    def test_other_optimizers_raise(self) -> None:
        recipe = {"model_name_or_path": "somewhere", "train_file": "data.json", "optim": "sgd"}
        with pytest.raises(ValueError, match="sgd"):
            read_setup(recipe)

    @pytest.mark.parametrize(
        "launch",
        [
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 1}},
            {
                "distributed_type": "DEEPSPEED",
                "deepspeed_config": {"zero_stage": 2, "offload_optimizer_device": "cpu"},
            },
            {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 1}},
            {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2, "fsdp_offload_params": True}},
            {"distributed_type": "TPU"},
        ],
    )
    def test_unsupported_accelerate_configs_raise(self, launch: dict, tmp_path: Path) -> None:
        (tmp_path / "launch.yaml").write_text(yaml.safe_dump(launch))
        recipe = {"model_name_or_path": "somewhere", "train_file": "data.json"}
        with pytest.raises(ValueError, match="launch.yaml"):
            read_setup(recipe, accelerate_config=tmp_path / "launch.yaml")


class TestCommand:
    def test_recipe_is_planned_without_weights(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        tiny_config().save_pretrained(tmp_path / "model")
        recipe = {"model_name_or_path": str(tmp_path / "model"), "train_file": "data.json", "stage": "finetune"}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        assert status("plan-memory", str(tmp_path / "recipe.yaml"), "--set", "max_length=32", "--num-gpus", "2") == 0
        output = capsys.readouterr().out
        assert "2 GPUs, ddp" in output
        assert "samples of 32 tokens" in output
        assert "total per GPU" in output

    def test_accelerate_config_by_name(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        tiny_config().save_pretrained(tmp_path / "model")
        recipe = {"model_name_or_path": str(tmp_path / "model"), "train_file": "data.json"}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        assert status("plan-memory", str(tmp_path / "recipe.yaml"), "--accelerate-config", "deepspeed_zero3") == 0
        assert "8 GPUs, zero3" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["finetune 8B"])
def test_page_shows_what_is_computed(name: str) -> None:
    """A row of the table that `florence-vl plan-memory` prints."""
    size, setup = KNOWN_RUNS[name]
    *_, row = format_table({name: plan_memory(published_config(size), setup)}).splitlines()
    assert row in (ROOT / "docs" / "planning.md").read_text(encoding="utf-8").splitlines()


def test_page_has_a_row_for_each_known_run() -> None:
    page = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    assert all(
        f"| {name} | {setup.num_gpus} | {setup.batch_size} |" in page for name, (_, setup) in KNOWN_RUNS.items()
    )
