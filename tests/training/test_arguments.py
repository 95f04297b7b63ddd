# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import os
from pathlib import Path

import pytest

from florence_vl_hf import FlorenceVLConfig
from florence_vl_hf.training import RECIPES, read_recipe
from florence_vl_hf.training.arguments import CHECKPOINTING, find_recipe, parse_recipe


QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart" / "quickstart_lora.yaml"
# Recipes request bfloat16, which Transformers refuses on a machine without it.
ON_CPU = {"use_cpu": True}


def recipe_files() -> list[str]:
    files = [path for path in RECIPES.glob("**/*.yaml") if "accelerate" not in path.parts]
    return sorted(path.relative_to(RECIPES).with_suffix("").as_posix() for path in files)


def parsed(name: str):
    return parse_recipe(read_recipe(name) | ON_CPU)


class TestRecipes:
    @pytest.mark.parametrize("name", [*recipe_files(), QUICKSTART])
    def test_can_be_read(self, name):
        model, data, args = parsed(name)
        assert model.model_name_or_path and data.train_file and args.output_dir
        assert args.remove_unused_columns is False

    def test_there_is_one_for_everything(self):
        ablations = ["fusion_token", "fusion_average", "features_image_only"]
        ablations += [f"features_without_{name}" for name in ("caption", "ocr", "grounding")]
        names = ["pretrain_8b", "pretrain_3b", "finetune_8b", "finetune_3b", "lora_8b", "qlora_8b", "projector_8b"]
        assert {*names, *(f"ablations/{name}" for name in ablations)} == set(recipe_files())

    # The paper's table: stage, learning rate, batch size per GPU, accumulation, epochs, chat template, padding.
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
        model, data, args = parsed(name)
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
        for name, num_bits in (("lora_8b", None), ("qlora_8b", 4)):
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
        model, _, _ = parsed(f"ablations/{name}")
        given = {"fusion_strategy": model.fusion_strategy, "fusion_features": model.fusion_features}
        config = FlorenceVLConfig(**{key: value for key, value in given.items() if value is not None})
        assert (config.num_image_tokens, config.fused_hidden_size) == (num_image_tokens, fused_hidden_size)


class TestReadRecipe:
    def write(self, folder: Path, name: str, text: str) -> Path:
        path = folder / name
        path.write_text(text, encoding="utf-8")
        return path

    def test_overrides_come_last(self, tmp_path):
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
            ("extends: other.yaml\n", "no recipe other.yaml; .*finetune_8b, lora_8b"),
            ("- a\n- b\n", "own.yaml is not a recipe"),
            ("a: [1\n", "own.yaml is not YAML"),
        ],
    )
    def test_file_that_is_not_a_recipe(self, tmp_path, text, message):
        with pytest.raises(ValueError, match=message):
            read_recipe(self.write(tmp_path, "own.yaml", text))

    def test_recipe_of_the_package_by_name(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert find_recipe("lora_8b") == find_recipe("lora_8b.yaml") == RECIPES / "lora_8b.yaml"
        assert find_recipe("accelerate/ddp") == RECIPES / "accelerate" / "ddp.yaml"
        assert read_recipe("ablations/fusion_token")["fusion_strategy"] == "token"
        path = self.write(tmp_path, "own.yaml", "extends: lora_8b\nlora_r: 8\n")
        assert read_recipe(path) == read_recipe("lora_8b") | {"lora_r": 8}

    def test_an_existing_path_takes_precedence(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        self.write(tmp_path, "lora_8b.yaml", "seed: 1\n")
        assert read_recipe("lora_8b.yaml") == {"seed": 1}
        # A directory is not a recipe.
        (tmp_path / "lora_8b").mkdir()
        assert read_recipe("lora_8b")["use_peft"] is True
        # Relative to the recipe that extends it, not to the current directory.
        (tmp_path / "deeper").mkdir()
        self.write(tmp_path / "deeper", "lora_8b.yaml", "seed: 2\n")
        assert read_recipe(self.write(tmp_path / "deeper", "own.yaml", "extends: lora_8b.yaml\n")) == {"seed": 2}

    def test_an_override_without_value(self, tmp_path):
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

    def test_numbers_and_single_values(self):
        given = {"learning_rate": 1, "run_name": 2024, "fusion_features": "image", "max_steps": "5"}
        model, _, args = parse_recipe(self.needed | given)
        assert (args.learning_rate, args.run_name, args.max_steps) == (1.0, "2024", 5)
        assert isinstance(args.learning_rate, float) and model.fusion_features == ["image"]

    @pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
    def test_both_names_of_checkpointing(self, name, recwarn):
        _, _, args = parse_recipe(self.needed | {name: True, f"{name}_kwargs": {"use_reentrant": False}})
        assert getattr(args, CHECKPOINTING) is args.gradient_checkpointing is True
        assert getattr(args, f"{CHECKPOINTING}_kwargs") == {"use_reentrant": False}
        assert not [warning for warning in recwarn if "checkpointing" in str(warning.message)]

    def test_no_more_workers_than_cores(self):
        _, _, args = parse_recipe(self.needed | {"dataloader_num_workers": 10_000})
        assert 1 <= args.dataloader_num_workers <= os.cpu_count()

    def test_text_that_looks_like_an_option(self):
        _, data, _ = parse_recipe(self.needed | {"train_file": "--odd name"})
        assert data.train_file == "--odd name"

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({5: 1}, "no setting '5'"),
            ({"learning_rat": 1}, "'learning_rat'; did you mean 'learning_rate'"),
            ({"learning_rate": "fast"}, "learning_rate: 'fast'.*expected float"),
            ({"lora_r": "many"}, "lora_r: 'many'.*expected int"),
            ({"max_steps": 1.5}, "max_steps: 1.5.*expected int"),
            ({"max_steps": True}, "max_steps: True.*expected int"),
            ({"bf16": "perhaps"}, "bf16: 'perhaps'.*expected bool"),
            ({"dtype": "int8"}, "dtype: 'int8'.*'bfloat16'"),
            ({"eval_strategy": "sometimes"}, "sometimes.*'steps'"),
            ({"fusion_features": [1]}, r"fusion_features: \[1\].*list\[str\]"),
            ({"eval_file": {"a": 1}}, "eval_file.*dict"),
            ({"lr_scheduler_kwargs": [1]}, "lr_scheduler_kwargs"),
            ({"stage": "all"}, "stage.*'all'.*'finetune'"),
            ({"on_error": "ignore"}, "on_error.*'ignore'"),
            ({"load_in_4bit": True}, "4 bits cannot be trained.*use_peft"),
            ({"load_in_4bit": True, "load_in_8bit": True, "use_peft": True}, "both"),
            ({"use_peft": True, "fusion_strategy": "average"}, "another fusion together with `use_peft`"),
            ({"max_length": 0}, "max_length: 0"),
            ({"max_image_side": 0}, "max_image_side: 0"),
            ({"use_peft": True, "stage": "pretrain"}, "'pretrain'.*vision tower.*`finetune`"),
            ({"use_peft": True, "stage": "projector"}, "'projector': LoRA trains the language model"),
        ],
    )
    def test_wrong_settings(self, given, message):
        with pytest.raises(ValueError, match=message):
            parse_recipe(self.needed | given)

    def test_a_setting_that_is_missing(self):
        with pytest.raises(ValueError, match="train_file"):
            parse_recipe({"model_name_or_path": "m", "output_dir": "o"})
