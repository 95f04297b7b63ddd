# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
from pathlib import Path

import pytest

from florence_vl_hf import FlorenceVLConfig
from florence_vl_hf.training import read_recipe
from florence_vl_hf.training.arguments import parse_recipe


RECIPES = Path(__file__).parents[2] / "recipes"
# Recipes ask for bfloat16, which Transformers checks the machine for.
ON_CPU = {"use_cpu": True}


def recipe_files() -> list[str]:
    return sorted(
        path.relative_to(RECIPES).as_posix() for path in RECIPES.glob("**/*.yaml") if "accelerate" not in path.parts
    )


def parsed(name: str):
    return parse_recipe(read_recipe(RECIPES / name) | ON_CPU)


class TestRecipes:
    @pytest.mark.parametrize("name", recipe_files())
    def test_can_be_read(self, name):
        model, data, args = parsed(name)
        assert model.model_name_or_path and data.train_file and args.output_dir
        assert args.remove_unused_columns is False

    def test_there_is_one_for_everything(self):
        ablations = ["fusion_token", "fusion_average", "features_image_only"]
        ablations += [f"features_without_{name}" for name in ("caption", "ocr", "grounding")]
        names = ["pretrain_8b", "pretrain_3b", "finetune_8b", "finetune_3b", "lora_8b", "qlora_8b", "projector_8b"]
        assert {*(f"{name}.yaml" for name in names), *(f"ablations/{name}.yaml" for name in ablations)} <= set(
            recipe_files()
        )

    # The paper's table: stage, learning rate, batch of a GPU, accumulation, epochs, format, padded pictures.
    @pytest.mark.parametrize(
        ("name", "settings"),
        [
            ("pretrain_8b", ("pretrain", 1e-5, 16, 1, 1, "plain", False)),
            ("pretrain_3b", ("pretrain", 1e-5, 32, 1, 1, "plain", False)),
            ("finetune_8b", ("finetune", 1e-5, 8, 2, 1, "llama3", True)),
            ("finetune_3b", ("finetune", 9e-5, 32, 4, 3, "phi3", True)),
        ],
    )
    def test_the_papers_four(self, name, settings):
        model, data, args = parsed(f"{name}.yaml")
        assert settings == (
            model.stage,
            args.learning_rate,
            args.per_device_train_batch_size,
            args.gradient_accumulation_steps,
            args.num_train_epochs,
            data.chat_template,
            data.do_pad,
        )
        common = (args.lr_scheduler_type, args.warmup_steps, args.weight_decay, args.bf16, args.gradient_checkpointing)
        assert common == ("cosine", 0.03, 0.0, True, True)
        assert data.max_length == 2048
        assert args.train_sampling_strategy == ("group_by_length" if model.stage == "finetune" else "random")

    def test_lora_has_the_originals_numbers(self):
        for name, num_bits in (("lora_8b.yaml", None), ("qlora_8b.yaml", 4)):
            model, _, _ = parsed(name)
            assert (model.lora_r, model.lora_alpha, model.lora_dropout, model.num_bits) == (64, 16, 0.05, num_bits)
            assert model.use_peft

    @pytest.mark.parametrize(
        ("name", "num_image_tokens", "fused_hidden_size"),
        [
            ("fusion_token", 3 * 577, 1024),
            ("fusion_average", 577, 1024),
            ("features_image_only", 577, 1024),
            ("features_without_ocr", 577, 3072),
        ],
    )
    def test_ablations_are_those_of_the_paper(self, name, num_image_tokens, fused_hidden_size):
        model, _, _ = parsed(f"ablations/{name}.yaml")
        given = {"fusion_strategy": model.fusion_strategy, "fusion_features": model.fusion_features}
        config = FlorenceVLConfig(**{key: value for key, value in given.items() if value is not None})
        assert (config.num_image_tokens, config.fused_hidden_size) == (num_image_tokens, fused_hidden_size)


class TestReadRecipe:
    def write(self, folder: Path, name: str, text: str) -> Path:
        path = folder / name
        path.write_text(text, encoding="utf-8")
        return path

    def test_changes_come_last(self, tmp_path):
        self.write(tmp_path, "base.yaml", "learning_rate: 1\nseed: 1\nstage: pretrain\n")
        path = self.write(tmp_path, "own.yaml", "extends: base.yaml\nseed: 2\nstage: finetune\n")
        assert read_recipe(path, ["stage=projector", "fusion_features=[image, ocr]"]) == {
            "learning_rate": 1,
            "seed": 2,
            "stage": "projector",
            "fusion_features": ["image", "ocr"],
        }

    def test_no_is_a_word_and_false_is_false(self, tmp_path):
        path = self.write(tmp_path, "own.yaml", "save_strategy: no\nbf16: false\nuse_cpu: true\n")
        recipe = read_recipe(path, ["eval_strategy=no", "tf32=False", "output_dir=falsehood", "seed=1e-5"])
        assert recipe == {
            "save_strategy": "no",
            "bf16": False,
            "use_cpu": True,
            "eval_strategy": "no",
            "tf32": False,
            "output_dir": "falsehood",
            "seed": 1e-5,
        }

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("extends: own.yaml\n", "own.yaml extends itself"),
            ("extends: other.yaml\n", "no recipe .*other.yaml"),
            ("- a\n- b\n", "own.yaml is no recipe"),
            ("a: [1\n", "own.yaml is no YAML"),
        ],
    )
    def test_what_is_no_recipe(self, tmp_path, text, message):
        with pytest.raises(ValueError, match=message):
            read_recipe(self.write(tmp_path, "own.yaml", text))

    def test_a_change_without_value(self, tmp_path):
        with pytest.raises(ValueError, match="'seed'.*key=value"):
            read_recipe(self.write(tmp_path, "own.yaml", "seed: 1\n"), ["seed"])


class TestParseRecipe:
    needed = {"model_name_or_path": "m", "train_file": "t", "output_dir": "o", **ON_CPU}

    def test_types(self):
        given = {"learning_rate": "1e-5", "bf16": "true", "eval_file": {"a": "a.json", "b": "b.json"}}
        given |= {"lr_scheduler_kwargs": {"num_cycles": 2}, "projector_learning_rate": None}
        _, data, args = parse_recipe(self.needed | given)
        assert (args.learning_rate, args.bf16, args.lr_scheduler_kwargs) == (1e-5, True, {"num_cycles": 2})
        assert data.eval_files == {"a": "a.json", "b": "b.json"}
        assert args.projector_learning_rate is None

    def test_text_that_looks_like_an_option(self):
        _, data, _ = parse_recipe(self.needed | {"train_file": "--odd name"})
        assert data.train_file == "--odd name"

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"learning_rat": 1}, "'learning_rat'; did you mean 'learning_rate'"),
            ({"learning_rate": "fast"}, "learning_rate.*'fast'"),
            ({"stage": "all"}, "stage.*'all'.*'finetune'"),
            ({"on_error": "ignore"}, "on_error.*'ignore'"),
            ({"load_in_4bit": True}, "4 bits cannot be trained.*use_peft"),
            ({"load_in_4bit": True, "load_in_8bit": True, "use_peft": True}, "both"),
            ({"use_peft": True, "fusion_strategy": "average"}, "another fusion together with `use_peft`"),
            ({"max_length": 0}, "max_length: 0"),
            ({"use_peft": True, "stage": "pretrain"}, "'pretrain' trains the vision tower.*`finetune`"),
            ({"use_peft": True, "stage": "projector"}, "nothing for LoRA"),
        ],
    )
    def test_wrong_settings(self, given, message):
        with pytest.raises(ValueError, match=message):
            parse_recipe(self.needed | given)

    def test_a_setting_that_is_missing(self):
        with pytest.raises(ValueError, match="train_file"):
            parse_recipe({"model_name_or_path": "m", "output_dir": "o"})
