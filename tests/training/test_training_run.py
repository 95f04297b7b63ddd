# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText, AutoProcessor

from florence_vl_hf.conversion import CheckpointError, convert
from florence_vl_hf.conversion.checkpoint_files import locked, output_directory
from florence_vl_hf.hub import files_to_push
from florence_vl_hf.model_cards import read_training
from florence_vl_hf.processing import load_chat_template
from florence_vl_hf.training import train
from florence_vl_hf.training.stages import part_of

from ..conftest import FIXTURES, Golden, status
from .conversations import llava


# Trains with the recipe in its first argument, and is killed when half of the second checkpoint's optimizer states are
# written.
KILLED_WHILE_SAVING = """
import io, os, signal, sys
import torch, yaml
from florence_vl_hf.training import train

save = torch.save

def save_half(state, path, *arguments, **kwargs):
    if not str(path).endswith("checkpoint-4/optimizer.pt"):
        return save(state, path, *arguments, **kwargs)
    complete = io.BytesIO()
    save(state, complete)
    with open(path, "wb") as file:
        file.write(complete.getvalue()[: complete.tell() // 2])
    os.kill(os.getpid(), signal.SIGKILL)

torch.save = save_half
train(yaml.safe_load(open(sys.argv[1])))
"""


def weights(directory: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(directory) / "model.safetensors")


class TestFullTraining:
    @pytest.mark.slow
    def test_recipe_to_directory(self, recipe, tmp_path, golden, capsys):
        evaluated = {"eval_file": recipe["train_file"], "predict_with_generate": True, "generation_max_new_tokens": 4}
        recipe |= evaluated | {"eval_strategy": "steps", "eval_steps": 2, "logging_steps": 1}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        assert status("train", path, "--set", "max_steps=3", "--set", "chat_template=vicuna") == 0
        output = Path(recipe["output_dir"])

        # It is complete, as uploads check it, and was trained.
        assert {"model.safetensors", "README.md", "processor_config.json"} <= set(files_to_push(output))
        model = AutoModelForImageTextToText.from_pretrained(output)
        before = weights(recipe["model_name_or_path"])
        moved = {
            name.split(".")[1] for name, tensor in weights(output).items() if not tensor.equal(before[name].float())
        }
        assert moved == {"multi_modal_projector", "language_model", "weight"}
        processor = AutoProcessor.from_pretrained(output)
        assert processor.chat_template == load_chat_template("vicuna", processor.tokenizer)
        inputs = processor(images=golden.image("odd.jpg"), text="<image>", return_tensors="pt")
        assert model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]

        log = json.loads((output / "trainer_state.json").read_text())["log_history"]
        assert [entry["step"] for entry in log if "eval_exact_match" in entry] == [2, 3]
        assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3]

    def test_model_card(self, recipe):
        recipe |= {"eval_file": {"old": recipe["train_file"], "new": recipe["train_file"]}, "weight_decay": 0.0}
        metrics = train(recipe | {"projector_learning_rate": 2e-3, "logging_steps": 2})
        card = ModelCard.load(Path(recipe["output_dir"]) / "README.md")
        assert card.data.library_name == "transformers" and card.data.pipeline_tag == "image-text-to-text"
        for row in (
            "| stage | finetune |",
            "| data | data.json, 8 samples |",
            "| steps | 4, 1.00 epochs |",
            "| learning_rate | 0.001 |",
            "| projector_learning_rate | 0.002 |",
            f"| old | {metrics['eval_old_loss']:.4f} |",
            f"| new | {metrics['eval_new_loss']:.4f} |",
        ):
            assert row in card.text, card.text
        # No path of this machine.
        assert str(Path(recipe["output_dir"]).parent) not in card.content
        assert str(Path(recipe["model_name_or_path"]).parent) not in card.content

    def test_another_fusion_has_another_first_layer(self, recipe, caplog):
        train(recipe | {"stage": "projector", "fusion_strategy": "token", "max_steps": 1})
        model = AutoModelForImageTextToText.from_pretrained(recipe["output_dir"])
        processor = AutoProcessor.from_pretrained(recipe["output_dir"])
        before = AutoModelForImageTextToText.from_pretrained(recipe["model_name_or_path"]).config
        assert model.config.fusion_strategy == "token"
        assert processor.num_image_tokens == model.config.num_image_tokens == 4 * before.num_image_tokens
        assert "first layer of the projector is new" in caplog.text

    @pytest.mark.slow
    def test_padding_of_the_recipe(self, recipe):
        for do_pad in (True, False):
            output = f"{recipe['output_dir']}-{do_pad}"
            train(recipe | {"do_pad": do_pad, "max_steps": 1, "output_dir": output})
            assert AutoProcessor.from_pretrained(output).image_processor.do_pad == do_pad

    @pytest.mark.slow
    @pytest.mark.parametrize("use_peft", [False, True])
    def test_upload_has_the_same_card(self, recipe, use_peft, monkeypatch):
        sent = {}

        def upload_folder(*_: object, folder_path: str, **__: object) -> None:
            sent.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir() if path.is_file()})

        monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: SimpleNamespace(repo_id="someone/florence"))
        monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
        train(recipe | {"push_to_hub": True, "hub_model_id": "someone/florence", "use_peft": use_peft, "lora_r": 4})
        card = sent["README.md"].decode()
        assert "# someone/florence" in card and "| stage | finetune |" in card
        assert ("adapter_model.safetensors" in sent) == use_peft
        assert ("modeling_florence_vl.py" in sent) == (not use_peft)

    def test_starts_from_an_original_checkpoint(self, recipe, tmp_path):
        original = Golden(FIXTURES / "phi-small").checkpoint
        train(recipe | {"model_name_or_path": str(original), "max_steps": 1, "learning_rate": 0.0})
        convert(original, tmp_path / "converted", dtype=torch.float32)
        files_to_push(Path(recipe["output_dir"]))
        assert_close(weights(recipe["output_dir"]), weights(tmp_path / "converted"), rtol=0, atol=0)


class TestLora:
    def test_loads_through_peft(self, recipe, golden):
        train(recipe | {"use_peft": True, "lora_r": 4, "logging_steps": 1, "seed": 3})
        output = recipe["output_dir"]
        base = AutoModelForImageTextToText.from_pretrained(recipe["model_name_or_path"], dtype=torch.float32).eval()
        processor = AutoProcessor.from_pretrained(output)
        content = [{"type": "image", "image": golden.image("odd.jpg")}, {"type": "text", "text": "What is shown?"}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
        )
        before_peft = base.num_parameters()
        with torch.no_grad():
            before = base(**inputs).logits
            adapted = PeftModel.from_pretrained(base, output).eval()
            after = adapted(**inputs).logits
        assert (after - before).abs().max() > 1e-3
        trained = {part_of(name) for name in load_file(Path(output) / "adapter_model.safetensors")}
        assert trained == {"language_model", "projector"}
        card = ModelCard.load(Path(output) / "README.md")
        assert card.data.library_name == "peft"
        assert "| lora_r | 4 |" in card.text and "PeftModel.from_pretrained" in card.text
        assert "| optimizer | adamw_torch" in card.text
        assert f"| parameters | {before_peft:,}, without those of LoRA |" in card.text

    def test_merged_it_loads_without_peft(self, recipe, tmp_path):
        train(recipe | {"use_peft": True, "lora_r": 4, "eval_file": recipe["train_file"]})
        assert status("merge", recipe["output_dir"], tmp_path / "merged") == 0
        files_to_push(tmp_path / "merged")
        card = ModelCard.load(tmp_path / "merged" / "README.md")
        assert card.data.library_name == "transformers" and "lora" not in card.data.tags
        assert "| lora_r | 4 |" in card.text and "PeftModel" not in card.text
        # The facts about its training come from the metadata of the adapter's card.
        facts = read_training(Path(recipe["output_dir"]))
        assert facts is not None and facts.stage == "finetune" and facts.num_steps == 4
        assert set(facts.trained_parameters) == {"projector"} and facts.lora_parameters > 0
        assert f"| data | {facts.dataset}, 8 samples |" in card.text
        assert f"| evaluation | {facts.evaluations['evaluation']['loss']:.4f} |" in card.text


@pytest.mark.slow
class TestResume:
    def test_killed_while_saving_it_resumes_from_the_checkpoint_before(self, recipe, tmp_path):
        recipe |= {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "logging_steps": 1}
        straight = recipe | {"output_dir": str(tmp_path / "straight"), "save_strategy": "no"}
        train(straight)

        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        killed = subprocess.run(
            [sys.executable, "-c", KILLED_WHILE_SAVING, str(path)],
            env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
        torn = Path(recipe["output_dir"]) / "checkpoint-4"
        assert (torn / "model.safetensors").is_file() and (torn / "optimizer.pt").is_file()

        train(recipe)
        log = json.loads((Path(recipe["output_dir"]) / "trainer_state.json").read_text())["log_history"]
        assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4, 5, 6]
        assert_close(weights(recipe["output_dir"]), weights(straight["output_dir"]), rtol=0, atol=0)

    def test_a_recipe_that_changed_is_refused(self, recipe):
        recipe |= {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
        train(recipe)
        with pytest.raises(ValueError, match="cannot resume from .*checkpoint-2.*another `output_dir`"):
            train(recipe | {"use_peft": True, "lora_r": 4, "max_steps": 4})

    def test_a_run_that_had_ended_takes_no_further_step(self, recipe):
        # It ends within an epoch, of four steps.
        recipe |= {"save_strategy": "steps", "save_steps": 3, "max_steps": 3}
        train(recipe)
        before = weights(recipe["output_dir"])
        train(recipe)
        assert_close(weights(recipe["output_dir"]), before, rtol=0, atol=0)
        state = json.loads((Path(recipe["output_dir"]) / "trainer_state.json").read_text())
        assert state["global_step"] == 3

    def test_without_auto_resume_a_checkpoint_is_refused(self, recipe):
        recipe |= {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
        train(recipe)
        with pytest.raises(ValueError, match="checkpoint-2 of another run"):
            train(recipe | {"auto_resume": False, "max_steps": 3})
        assert train(recipe | {"auto_resume": False, "output_dir": recipe["output_dir"] + "-new"})["train_loss"] > 0

    def test_resume_from_checkpoint(self, recipe):
        train(recipe | {"save_strategy": "steps", "save_steps": 2, "max_steps": 2})
        checkpoint, other = recipe["output_dir"] + "/checkpoint-2", recipe["output_dir"] + "-other"
        train(recipe | {"resume_from_checkpoint": checkpoint, "output_dir": other, "max_steps": 3})
        log = json.loads((Path(other) / "trainer_state.json").read_text())["log_history"]
        assert log[-1]["step"] == 3
        with pytest.raises(ValueError, match="checkpoint at nowhere"):
            train(recipe | {"resume_from_checkpoint": "nowhere", "output_dir": other + "2"})


def test_settings_are_listed(capsys):
    assert status("train", "--settings") == 0
    printed = capsys.readouterr().out
    assert "stage: Literal['pretrain', 'finetune', " in printed and "] = 'finetune'\n    Training stage.\n" in printed
    assert "train_file: str\n" in printed and "per_device_train_batch_size" not in printed


def test_two_runs_do_not_write_the_same_directory(recipe):
    output = Path(recipe["output_dir"])
    with output_directory(output), pytest.raises(CheckpointError, match="Another run is writing"):
        train(recipe)
    with locked(output), pytest.raises(CheckpointError, match="Another run is writing"):
        convert(recipe["model_name_or_path"], output)
    with pytest.raises(ValueError, match="nowhere.json"):
        train(recipe | {"train_file": "nowhere.json"})
    assert [path for path in output.parent.iterdir() if path.name.startswith(".")] == []


class TestMistakes:
    @pytest.mark.slow
    def test_broken_samples(self, recipe, data_file, capsys, caplog, tmp_path):
        samples = json.loads(data_file.read_text())
        samples[0]["image"] = "nowhere.png"
        data_file.write_text(json.dumps(samples))
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        assert status("train", path, "--on-error", "raise") == 1
        assert "'sample-0'" in capsys.readouterr().err
        assert status("train", path) == 0
        assert "'sample-0'" in caplog.text and "Skipping a broken sample" in caplog.text
        assert "| skipped | 1 broken sample," in (Path(recipe["output_dir"]) / "README.md").read_text()

    @pytest.mark.slow
    @pytest.mark.parametrize("reason", ["broken", "not finite"])
    def test_a_run_that_learns_nothing_is_a_failure(self, recipe, data_file, tmp_path, capsys, reason):
        recipe |= {"save_strategy": "steps", "save_steps": 1, "logging_steps": 1}
        if reason == "broken":
            samples = [{**sample, "image": "nowhere.png"} for sample in json.loads(data_file.read_text())]
            data_file.write_text(json.dumps(samples))
        else:
            recipe |= {"learning_rate": 1e30, "optim": "sgd", "max_grad_norm": 0.0}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        for _ in range(2):
            assert status("train", path) == 1
            assert reason in capsys.readouterr().err
            output = Path(recipe["output_dir"])
            assert not (output / "model.safetensors").exists() and not (output / "README.md").exists()
            assert not list(output.glob("checkpoint-4"))

    @pytest.mark.slow
    def test_broken_evaluation_samples(self, recipe, tmp_path):
        (tmp_path / "eval.json").write_text(json.dumps([llava(image="nowhere.png")] * 3))
        metrics = train(recipe | {"eval_file": str(tmp_path / "eval.json"), "predict_with_generate": True})
        assert metrics["train_loss"] > 0 and not {"eval_loss", "eval_exact_match"} & metrics.keys()
        assert "| evaluation |" not in (Path(recipe["output_dir"]) / "README.md").read_text()

    def test_output_dir_with_inputs(self, recipe, tmp_path, monkeypatch):
        data = Path(recipe["train_file"]).rename(tmp_path / "data.json")
        (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "data.json").symlink_to(data)
        monkeypatch.chdir(tmp_path)
        for train_file, output_dir in [
            (str(data), str(tmp_path)),
            ("data.json", "."),
            ("link/data.json", str(tmp_path)),
            (str(data), "link"),
            ("elsewhere/data.json", "elsewhere"),
            ("elsewhere/data.json", str(tmp_path)),
        ]:
            before = sorted(tmp_path.rglob("*"))
            with pytest.raises(ValueError, match="data.json is in `output_dir: .*choose another"):
                train(recipe | {"train_file": train_file, "output_dir": output_dir})
            assert sorted(tmp_path.rglob("*")) == before
        model = recipe["model_name_or_path"]
        for given in ({"output_dir": model}, {"output_dir": recipe["image_folder"]}):
            with pytest.raises(ValueError, match="is in `output_dir"):
                train(recipe | {"train_file": "data.json"} | given)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"eval_strategy": "steps", "eval_steps": 1}, "no `eval_file`"),
            ({"answer_metric": "accuracy"}, "accuracy.*package.module:function"),
            ({"answer_metric": "nowhere:accuracy"}, "nowhere:accuracy.*PYTHONPATH"),
            ({"train_file": "nowhere.json"}, "nowhere.json"),
            ({"image_folder": "nowhere"}, "no image directory nowhere"),
            ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
            ({"fusion_features": ["image"], "stage": "language_model"}, "'language_model' does not train it"),
        ],
    )
    def test_settings(self, recipe, given, message):
        with pytest.raises(ValueError, match=message):
            train(recipe | given)

    def test_a_model_of_another_type(self, recipe, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
        with pytest.raises(ValueError, match="has model type 'llama', expected 'florence_vl'"):
            train(recipe | {"model_name_or_path": str(tmp_path)})


def test_own_metric(recipe, tmp_path, monkeypatch):
    (tmp_path / "my_metric.py").write_text("def count(answers, references):\n    return {'number': len(references)}\n")
    monkeypatch.syspath_prepend(tmp_path)
    recipe |= {"eval_file": recipe["train_file"], "predict_with_generate": True, "generation_max_new_tokens": 2}
    assert train(recipe | {"answer_metric": "my_metric:count", "max_steps": 1})["eval_number"] == 8
