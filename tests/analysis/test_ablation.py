# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import csv
import importlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from florence_vl_hf import FlorenceVLConfig, FlorenceVLForConditionalGeneration
from florence_vl_hf.analysis import ablation
from florence_vl_hf.analysis.ablation import ablate
from florence_vl_hf.conversion import convert
from florence_vl_hf.conversion.checkpoint_files import locked
from florence_vl_hf.training import RECIPES, FlorenceVLCollator, read_recipe

from ..conftest import FIXTURES, Golden, llava_sample, status


ROOT = Path(__file__).parents[2]
PHI = Golden(FIXTURES / "phi-small")
TOKEN = {"fusion_strategy": "token", "fusion_features": ["caption", "ocr"]}
NUM_STEPS = 4
# Kills the process in the third run, after the checkpoint of its second step.
KILLED = f"""
import os, signal, sys
from florence_vl_cli import main
from florence_vl_hf.training import FlorenceVLTrainer
train, num_steps = FlorenceVLTrainer.training_step, 0
def training_step(*args, **kwargs):
    global num_steps
    num_steps += 1
    if num_steps == {2 * NUM_STEPS + 3}:
        os.kill(os.getpid(), signal.SIGKILL)
    return train(*args, **kwargs)
FlorenceVLTrainer.training_step = training_step
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model for each of two seeds."""
    directory = tmp_path_factory.mktemp("models")
    for seed in range(2):
        convert(PHI.checkpoint, directory / f"{seed}", dtype=torch.float32)
        model = FlorenceVLForConditionalGeneration.from_pretrained(directory / f"{seed}")
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.data += 1e-3 * torch.randn_like(parameter)
        model.save_pretrained(directory / f"{seed}")
    return str(directory / "{seed}")


def make_grid(models: str, directory: Path, **changes: Any) -> dict[str, Any]:
    """Write data for a grid of two variants and two seeds, and return its settings."""
    samples = [llava_sample(number, [PHI.reference["images"][number % 5]]) for number in range(8)]
    for name, chosen in (("train", samples), ("few", samples[:3]), ("many", samples[2:])):
        (directory / f"{name}.json").write_text(json.dumps(chosen))
    settings = {
        "variants": {"channel": {}, "token": TOKEN},
        "seeds": [0, 1],
        "metrics": ["exact_match", "anls"],
        "model_name_or_path": models,
        "image_folder": str(PHI.folder / "images"),
        "train_file": str(directory / "train.json"),
        "eval_file": {name: str(directory / f"{name}.json") for name in ("few", "many")},
        "output_dir": str(directory / "output"),
        "max_steps": NUM_STEPS,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "generation_max_new_tokens": 4,
        "learning_rate": 1.0e-2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return {name: value for name, value in (settings | changes).items() if value is not None}


def write(grid: dict[str, Any], directory: Path) -> Path:
    path = directory / "grid.yaml"
    path.write_text(yaml.safe_dump(grid, sort_keys=False))
    return path


def run_python(*command: str | Path, directory: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TORCH_GLOO_LAZY_INIT": "0"}
    environment["HF_DATASETS_CACHE"] = str(directory / "cache")
    arguments = [sys.executable, *map(str, command)]
    return subprocess.run(arguments, env=environment, cwd=directory, capture_output=True, text=True, timeout=300)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The recipes of runs that this process trains."""
    recipes, train = [], ablation.train
    monkeypatch.setattr(ablation, "train", lambda recipe: [recipes.append(recipe), train(recipe)])
    return recipes


def outputs(directory: Path) -> dict[str, bytes]:
    """Return all results of a grid, with its answers and weights."""
    patterns = ("results.*", "*/*/*/*/answers.jsonl", "*/*/model/model.safetensors")
    files = [file for pattern in patterns for file in (directory / "output").glob(pattern)]
    return {file.relative_to(directory).as_posix(): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def finished(models: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a grid that ran in one go, through the command line."""
    directory = tmp_path_factory.mktemp("finished")
    assert status("ablate", write(make_grid(models, directory), directory)) == 0
    assert len(outputs(directory)) == 3 + 4 * (2 + 1)
    return directory


@pytest.mark.slow
class TestResults:
    def test_tables_are_those_of_the_scores(self, finished):
        markdown = (finished / "output" / "results.md").read_text(encoding="utf-8")
        header, _, *lines = [line.strip("| ").split(" | ") for line in markdown.split("\n\n")[0].splitlines()]
        table = {line[0]: dict(zip(header, line, strict=True)) for line in lines}
        with open(finished / "output" / "results.csv", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["image tokens"] for row in table.values()] == ["26", "52"]
        assert [row["variant"] for row in rows] == ["channel"] * 4 + ["token"] * 4
        spreads = set()
        for row in rows:
            scores = []
            for seed in (0, 1):
                folder = finished / "output" / row["variant"] / f"seed-{seed}" / "evaluation" / row["set"]
                samples = json.loads((folder / "scores.json").read_text())["samples"]
                scores.append(statistics.mean(sample[row["metric"]] for sample in samples))
            mean, spread = statistics.mean(scores), abs(scores[0] - scores[1]) / 2**0.5
            spreads.add(spread)
            assert [float(row["mean"]), float(row["standard_deviation"])] == pytest.approx([mean, spread])
            assert [float(row["seed 0"]), float(row["seed 1"])] == pytest.approx(scores)
            cell = table[row["variant"]][f"{row['set']} ({row['metric']})"]
            assert cell == f"{100 * mean:.1f} ± {100 * spread:.1f}"
        assert len(spreads) > 3
        plot = (finished / "output" / "results.svg").read_text(encoding="utf-8")
        assert all(f">{text}<" in plot for text in ("channel", "token", "few", "many", "exact_match (%)", "anls (%)"))

    def test_variants_differ_in_what_they_name(self, finished, models):
        base = FlorenceVLConfig.from_pretrained(models.format(seed=0))
        for variant, changes in (("channel", {}), ("token", TOKEN)):
            for seed in (0, 1):
                model = finished / "output" / variant / f"seed-{seed}" / "model"
                trained = FlorenceVLConfig.from_pretrained(model).to_dict()
                # The width of the fused features is derived from them.
                expected = FlorenceVLConfig.from_dict(base.to_dict() | changes).to_dict()
                assert {name for name in trained if trained[name] != base.to_dict().get(name)} - {
                    "vision_config",
                    "_name_or_path",
                } == set(changes)
                assert all(trained[name] == expected[name] for name in (*changes, "vision_config"))

    def test_one_seed_has_no_spread(self, models, tmp_path):
        changes = {"seeds": [1], "variants": {"token": TOKEN}, "metrics": None, "max_steps": 1}
        few = {"eval_file": str(make_grid(models, tmp_path)["eval_file"]["few"])}
        table = ablate(make_grid(models, tmp_path, **changes, **few))
        assert re.fullmatch(
            r"\| token \| 52 \| [\d.]+ \|\n\nIn percent: with the seed 1\.\n", table.split("---: |\n")[1]
        )
        assert "evaluation (exact_match)" in table and "nan" not in (tmp_path / "output" / "results.csv").read_text()


@pytest.mark.slow
class TestEqualConditions:
    def test_variants_start_from_the_same_weights(self, models, tmp_path):
        """With a learning rate of 0, the saved weights are the first ones."""
        ablate(make_grid(models, tmp_path, learning_rate=0.0, max_steps=1))
        for seed in (0, 1):
            model, *others = (load_file(f"{models.format(seed=s)}/model.safetensors") for s in (seed, 1 - seed))
            channel, token = (
                load_file(tmp_path / "output" / variant / f"seed-{seed}" / "model" / "model.safetensors")
                for variant in ("channel", "token")
            )
            assert channel.keys() == model.keys() and all(channel[name].equal(model[name]) for name in model)
            new = {name for name in model if not (name in token and token[name].equal(model[name]))}
            assert new == {"model.multi_modal_projector.layers.0.weight"}
            assert not any(model[name].equal(others[0][name]) for name in model if "weight" in name)

    def test_variants_read_the_same_data_in_the_same_order(self, models, tmp_path, monkeypatch):
        read, original = [], FlorenceVLCollator.__call__

        def collate(self, samples):
            read.append(tuple(sample["id"] for sample in samples))
            return original(self, samples)

        monkeypatch.setattr(FlorenceVLCollator, "__call__", collate)
        ablate(make_grid(models, tmp_path))
        runs = [read[start : start + len(read) // 4] for start in range(0, len(read), len(read) // 4)]
        assert runs[0] == runs[1] != runs[2] == runs[3]
        assert {name for batch in runs[0] for name in batch} == {f"sample-{number}" for number in range(8)}


@pytest.mark.slow
class TestResuming:
    def test_a_killed_grid_ends_as_if_it_was_not(self, finished, models, tmp_path, trained):
        path = write(make_grid(models, tmp_path), tmp_path)
        killed = run_python("-c", KILLED, "ablate", path, directory=tmp_path)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        third = tmp_path / "output" / "channel" / "seed-1"
        assert (third / "model" / "checkpoint-2").exists() and not (third / "scores.json").exists()
        assert status("ablate", path) == 0
        assert [recipe["output_dir"] for recipe in trained] == [
            str(tmp_path / "output" / variant / "seed-1" / "model") for variant in ("channel", "token")
        ]
        assert outputs(tmp_path) == outputs(finished)

    def test_two_processes_have_the_results_of_one(self, finished, models, tmp_path):
        launch = "accelerate.commands.launch --multi_gpu --main_process_port=0 --num_processes=2 --mixed_precision=no"
        path = write(make_grid(models, tmp_path), tmp_path)
        command = ["-m", *launch.split(), "--tee=3", "-m", "florence_vl_hf", "ablate", path]
        result = run_python(*command, directory=tmp_path)
        assert result.returncode == 0, result.stderr
        runs = re.findall(r"\[default(\d)\]:.*Training (\w+) with seed (\d)", result.stderr)
        assert sorted(run[1:] for run in runs) == [(v, s) for v in ("channel", "token") for s in "01"]
        assert {run[0] for run in runs} == {"0", "1"}
        assert outputs(tmp_path) == outputs(finished)

    def test_a_run_of_another_process_is_left_to_it(self, models, tmp_path, capfd):
        grid = make_grid(models, tmp_path, variants={"channel": {}}, max_steps=1)
        with locked(tmp_path / "output" / "channel" / "seed-1"):
            assert status("ablate", write(grid, tmp_path)) == 0
            assert "Other processes" in capfd.readouterr().out
            assert [file.name for file in tmp_path.glob("output/*/*/scores.json")] == ["scores.json"]
        assert not (tmp_path / "output" / "results.md").exists()

    def test_finished_runs_are_not_repeated(self, models, tmp_path, trained):
        grid = make_grid(models, tmp_path, max_steps=1)
        channel = {"variants": {"channel": {}}, "seeds": [0]}
        ablate(grid | channel)
        assert len(trained) == 1
        ablate(grid | channel)
        ablate(grid | channel | {"metrics": ["anls"], "eval_file": grid["eval_file"]["few"]})
        assert len(trained) == 1
        ablate(grid | {"seeds": [0]})
        assert [recipe.get("fusion_strategy") for recipe in trained] == [None, "token"]

    def test_changed_runs_are_refused(self, models, tmp_path, capfd):
        grid = make_grid(models, tmp_path, seeds=[1], max_steps=1)
        ablate(grid)
        before = outputs(tmp_path)
        path = write(grid, tmp_path)
        for change in ("learning_rate=0.5", "variants={new: {}, token: {fusion_strategy: token}}"):
            assert status("ablate", path, "--set", change) == 1
            assert re.search("has a run with other settings .*, now ", capfd.readouterr().err)
        (tmp_path / "train.json").write_text(json.dumps([llava_sample(7, ["odd.jpg"])]))
        with pytest.raises(ValueError, match=r"other settings \(content of train_file"):
            ablate(grid)
        assert outputs(tmp_path) == before and not (tmp_path / "output" / "new").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"metric": ["anls"], "lr": 1},
            "no setting metric, lr; it has variants, seeds, metrics, and those of",
        ),
        ({"variants": None}, "Got `variants: None`, expected"),
        (
            {"variants": {"a": {"fusion": "token", "seed": 1}}},
            "'a' has no setting fusion, seed; a variant has f",
        ),
        (
            {"variants": {"a": {"fusion_features": ["imag"]}}},
            "'a' is not possible: `fusion_features` is .'imag'.",
        ),
        ({"variants": {"a": {"fusion_strategy": "chanel"}}}, "'a' is not possible: .* expected one of .'channel', 't"),
        ({"variants": {"a/b": {}}}, "Got 'a/b' as a name"),
        ({"seeds": 3}, "Got `seeds: 3`, expected a list of different integers"),
        ({"seeds": [1, 1]}, "Got `seeds: .1, 1.`"),
        ({"metrics": ["bleu"]}, "no metric bleu; choose from exact_match"),
        ({"metrics": ["vqa_accuracy"]}, "requires several"),
        ({"learning_rate": "fast"}, "Got `learning_rate: 'fast'`, expected float"),
        ({"model_name_or_path": "nowhere"}, "nowhere is neither"),
        ({"eval_file": None}, "lacks `eval_file`"),
        ({"eval_file": {"a": "nowhere.json"}}, "no file nowhere.json"),
        ({"eval_strategy": "steps"}, "Got `eval_strategy`"),
    ],
)
def test_a_wrong_grid_trains_nothing(changes, message, models, tmp_path, capfd):
    assert status("ablate", write(make_grid(models, tmp_path, **changes), tmp_path)) == 1
    [error] = [line for line in capfd.readouterr().err.split("\n") if line.startswith("florence-vl: ")]
    assert re.search(message, error), error
    assert not (tmp_path / "output").exists()


@pytest.mark.slow
def test_example(tmp_path, monkeypatch):
    """The example's variants are those of the package's recipes, and its data and models are trained on."""
    monkeypatch.syspath_prepend(ROOT / "examples" / "quickstart")
    monkeypatch.syspath_prepend(ROOT / "examples" / "ablation")
    words = importlib.import_module("words")
    words.main(tmp_path / "ablation-data", seed=0, num_images=16, held_out=2, num_models=1)
    recipes = [read_recipe(path) for path in RECIPES.glob("ablations/*.yaml")]
    fusions = [{name: recipe[name] for name in recipe if name.startswith("fusion_")} for recipe in recipes]
    grid = read_recipe(ROOT / "examples" / "ablation" / "grid.yaml")
    assert sorted(map(str, grid["variants"].values())) == sorted(map(str, [*fusions, {}]))
    monkeypatch.chdir(tmp_path)
    table = ablate(grid | {"seeds": [0], "max_steps": 1})
    assert [line.split(" | ")[0].strip("| ") for line in table.splitlines()[2:9]] == list(grid["variants"])
