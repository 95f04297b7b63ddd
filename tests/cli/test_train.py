# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import pytest
import yaml

from ..conftest import FIXTURES, status, tiny_config


ORIGINAL = FIXTURES / "phi-small" / "checkpoint"


@pytest.fixture
def recipe(tmp_path):
    tiny_config().save_pretrained(tmp_path / "model")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model_name_or_path": str(tmp_path / "model"), "train_file": "data.json"}))
    return path


class TestCheckData:
    @pytest.mark.parametrize("is_original", [False, True])
    def test_counts_tokens_with_the_model(self, is_original, converted, data_file, golden, capfd):
        # Only this original contains its vision tower.
        model = ORIGINAL if is_original else converted
        arguments = ["--image-folder", golden.folder / "images", "--model", model, "--workers", "0"]
        assert status("check-data", data_file, *arguments) == 0
        assert "Tokens per sample" in capfd.readouterr().out

    def test_chat_template_requires_a_model(self, data_file, capfd):
        assert status("check-data", data_file, "--chat-template", "plain") == 2
        assert "--model" in capfd.readouterr().err


class TestTrain:
    def test_settings_need_no_recipe(self, capfd):
        assert status("train", "--settings") == 0
        assert "projector_learning_rate" in capfd.readouterr().out

    def test_overrides(self, recipe, monkeypatch):
        received = []
        monkeypatch.setattr("florence_vl_hf.training.train", received.append)
        assert status("train", recipe, "--set", "stage=projector", "--on-error", "raise") == 0
        assert received[0]["stage"] == "projector" and received[0]["on_error"] == "raise"
        assert status("train", recipe, "--on-error", "ignore") == 2
