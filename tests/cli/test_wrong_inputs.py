# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Damaged, missing and mistyped files: each command ends with one line that names the file."""

import json
import re
import shutil
import socket
from pathlib import Path

import pytest
import yaml

from florence_vl_cli.serve import listen

from ..conftest import FIXTURES, Golden, llava_sample, status
from ..serving.test_demo import free_port


PHI = Golden(FIXTURES / "phi-small")
REFERENCE = PHI.folder / "reference.safetensors"
CONTENTS = {
    "empty": b"",
    "list": b"[]",
    "null": b"null",
    "string": b'"x"',
    "binary": bytes(range(256)),
    "deep": b'{"a":' * 50_000,
}


def damage(path: Path, how: str) -> Path:
    path.unlink(missing_ok=True)
    if how == "directory":
        path.mkdir()
    elif how == "loop":
        path.symlink_to(path)
    else:
        path.write_bytes(CONTENTS[how])
    return path


def error_of(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Run a command that fails, and return its only line of error."""
    assert status(*arguments) == 1
    [error] = [line for line in capfd.readouterr().err.split("\n") if line.startswith("florence-vl: error: ")]
    return error.removeprefix("florence-vl: error: ")


@pytest.fixture
def directory(converted: Path, tmp_path: Path) -> Path:
    """A converted model to damage."""
    return Path(shutil.copytree(converted, tmp_path / "model"))


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """A file of one sample, without an image."""
    file = tmp_path / "samples.json"
    file.write_text(json.dumps([llava_sample(0, [])]))
    return file


def answering(model: str | Path, samples: Path) -> dict[str, list[str | Path]]:
    """Commands that answer with a model of any layout."""
    output = samples.parent / "out"
    return {
        "predict": ["predict", samples, model, "--output", output, "--device", "cpu"],
        "eval": ["eval", samples, model, "--output", output, "--device", "cpu"],
        "serve": ["serve", model, "--port", "0", "--device", "cpu"],
        "demo": ["demo", model, "--port", str(free_port()), "--device", "cpu"],
    }


def commands(model: Path, tmp_path: Path, samples: Path) -> dict[str, list[str | Path]]:
    """Commands that read a model in this package's layout."""
    return {
        **answering(model, samples),
        "chat": ["chat", model, "--device", "cpu"],
        "export": ["export", model, tmp_path / "out"],
        "push": ["push", model, "me/model", "--dry-run"],
        "verify": ["verify", model, "--reference", REFERENCE, "--device", "cpu"],
    }


class TestModels:
    @pytest.mark.parametrize("how", [*CONTENTS, "directory", "loop"])
    @pytest.mark.parametrize("name", ["config.json", "generation_config.json", "processor_config.json"])
    def test_damaged_json(self, name, how, directory, capfd):
        file = damage(directory / name, how)
        assert str(file) in error_of(capfd, "chat", directory)

    @pytest.mark.parametrize("command", ["chat", "export", "push", "verify", "predict", "eval", "serve", "demo"])
    @pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja"])
    def test_every_command_names_the_file(self, command, name, directory, tmp_path, samples, capfd):
        file = damage(directory / name, "binary")
        assert str(file) in error_of(capfd, *commands(directory, tmp_path, samples)[command])
        # The directory of `eval` has the settings of the run.
        assert command == "eval" or not (tmp_path / "out").exists()

    @pytest.mark.parametrize("how", ["empty", "binary", "directory"])
    def test_damaged_weights(self, how, directory, capfd):
        damage(directory / "model.safetensors", how)
        assert "model.safetensors is damaged or incomplete" in error_of(capfd, "chat", directory)

    @pytest.mark.parametrize("how", ["empty", "directory"])
    def test_damaged_tokenizer_model(self, how, directory, capfd):
        file = damage(directory / "tokenizer.model", how)
        assert str(file) in error_of(capfd, "chat", directory)

    def test_empty_tokenizer_model_of_an_original(self, tmp_path, capfd):
        source = shutil.copytree(PHI.checkpoint, tmp_path / "original")
        damage(source / "tokenizer.model", "empty")
        error = error_of(capfd, "convert", source, tmp_path / "out")
        assert error == f"{source}/tokenizer.model is empty; download it again."

    @pytest.mark.parametrize(
        ("name", "changes", "message"),
        [
            ("config.json", {"image_size": "large"}, "Field 'image_size' expected int, got str"),
            ("config.json", {"prompts": {"caption": 7}}, "field 'prompts'"),
            ("config.json", {"text_config": "llama"}, "The configuration of"),
            ("config.json", {"dtype": -7}, "dtype -7"),
            ("config.json", {"model_type": ["florence_vl"]}, "model type ['florence_vl'], expected 'florence_vl'"),
            ("processor_config.json", {"image_processor": None}, "The processor in"),
            (
                "processor_config.json",
                {"image_processor": {"image_processor_type": "LlavaImageProcessor", "image_mean": [1]}},
                "The processor in",
            ),
            ("processor_config.json", {"num_image_tokens": "many"}, ""),
            ("tokenizer.json", {"added_tokens": None}, "The processor in"),
            ("tokenizer.json", {"model": {}}, "The processor in"),
        ],
    )
    def test_wrong_fields(self, name, changes, message, directory, capfd):
        contents = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps({**contents, **changes}))
        error = error_of(capfd, "push", directory, "me/model", "--dry-run")
        assert str(directory) in error and message in error

    @pytest.mark.parametrize("how", [*CONTENTS, "directory"])
    def test_damaged_adapter(self, how, directory, tmp_path, capfd):
        adapter = tmp_path / "adapter"
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(directory)}))
        damage(adapter / "adapter_model.safetensors", how)
        for command in (["merge", adapter, tmp_path / "out"], ["chat", adapter]):
            assert "adapter_model.safetensors is damaged or incomplete" in error_of(capfd, *command)

    def test_model_without_a_chat_template(self, directory, capfd):
        (directory / "chat_template.jinja").unlink()
        assert "The processor has no chat template" in error_of(capfd, "chat", directory)


class TestPaths:
    """A mistyped path is not looked up on the Hub."""

    @pytest.fixture(autouse=True)
    def _no_connections(self, monkeypatch):
        connections = []
        monkeypatch.setattr(socket.socket, "connect", lambda _, address: connections.append(address))
        yield
        assert connections == []

    @pytest.mark.parametrize("model", ["", " ", "nowhere", "./me/model", "~/model", "/no/where", "a/b/c", "model/"])
    def test_no_hub_id(self, model, tmp_path, monkeypatch, capfd):
        monkeypatch.chdir(tmp_path)
        self.refuse(model, tmp_path, capfd)

    def test_parent_exists(self, tmp_path, monkeypatch, capfd):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "runs").mkdir()
        assert "not looked up on the Hub because runs exists here" in self.refuse("runs/mine", tmp_path, capfd)

    def test_file(self, tmp_path, capfd):
        (tmp_path / "model.safetensors").touch()
        assert "is a file; give the directory" in self.refuse(tmp_path / "model.safetensors", tmp_path, capfd)

    @staticmethod
    def refuse(model: str | Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> str:
        samples = tmp_path / "data.json"
        samples.write_text(json.dumps([llava_sample(0, [])]))
        recipe = {"model_name_or_path": str(model), "train_file": "data.json", "output_dir": str(tmp_path / "run")}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        errors = set()
        for arguments in (
            ["convert", model, tmp_path / "out"],
            ["convert", PHI.checkpoint, tmp_path / "out", "--vision-tower", model],
            ["export", model, tmp_path / "out"],
            ["assemble", "--vision-tower", model, "--llm", model, "--output", tmp_path / "out"],
            ["verify", model, "--reference", REFERENCE],
            ["chat", model],
            ["merge", model, tmp_path / "out"],
            ["check-data", samples, "--model", model],
            *answering(model, samples).values(),
            ["train", tmp_path / "recipe.yaml"],
            *([["check-data", model]] if "." not in str(model) else []),
        ):
            errors.add(error_of(capfd, *arguments))
        [error] = errors
        assert (str(model) if str(model).strip() else "Got an empty path") in error
        return error


def test_truncated_template(directory, tmp_path, capfd):
    template = directory / "chat_template.jinja"
    template.write_text(template.read_text()[:-20])
    assert "TemplateSyntaxError" in error_of(capfd, "push", directory, "me/model", "--dry-run")


def test_long_message_is_shortened(tmp_path, capfd):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model_name_or_path: x\ntrain_file: y\nmax_steps: {'z' * 5000}")
    error = error_of(capfd, "train", recipe)
    assert len(error) < 1050 and error.startswith("Got `max_steps: 'zzz") and error.endswith("expected int.")


class TestOtherFiles:
    @pytest.mark.parametrize("how", [*CONTENTS, "directory", "loop"])
    def test_damaged_record_of_a_reference(self, how, directory, tmp_path, capfd):
        reference = Path(shutil.copy(REFERENCE, tmp_path))
        file = damage(reference.with_suffix(".json"), how)
        assert str(file) in error_of(capfd, "verify", directory, "--reference", reference, "--device", "cpu")

    @pytest.mark.parametrize("how", ["binary", "deep", "list", "directory"])
    def test_damaged_recipe(self, how, tmp_path, capfd):
        file = damage(tmp_path / "recipe.yaml", how)
        assert str(file) in error_of(capfd, "train", file)

    @pytest.mark.parametrize("command", ["check-data", "predict", "eval"])
    @pytest.mark.parametrize("how", [*CONTENTS, "directory"])
    def test_damaged_data(self, how, command, tmp_path, capfd):
        file = damage(tmp_path / "data.json", how)
        arguments = [command, file] if command == "check-data" else answering("nowhere", file)[command]
        assert str(file) in error_of(capfd, *arguments)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["predict", "eval"])
class TestAnswers:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{\n", "Line 1 is not JSON"),
            ('{"conversations": 7}\n', "expected an object with a list of turns"),
            (json.dumps(llava_sample(0, ["nowhere.png"])), "There is no image '.*nowhere.png'; add it"),
        ],
    )
    def test_all_samples_are_broken(self, command, text, message, converted, samples, capfd):
        samples = samples.with_suffix(".jsonl")
        samples.write_text(text)
        assert re.search(message, error_of(capfd, *answering(converted, samples)[command]))

    @pytest.mark.parametrize(
        ("server", "message"),
        [
            ("http://127.0.0.1:9/v1", "http://127.0.0.1:9/v1 does not answer for the model 'served'"),
            ("127.0.0.1:9/v1", "Got the server '127.0.0.1:9/v1', expected a URL such as http:"),
            ("", "Got the server '', expected a URL"),
        ],
    )
    def test_server(self, command, server, message, samples, monkeypatch, capfd):
        monkeypatch.setattr("florence_vl_hf.evaluation.server.MAX_RETRIES", 0)
        assert message in error_of(capfd, *answering("served", samples)[command], "--server", server)

    def test_output_in_a_file(self, command, converted, samples, capfd):
        output = samples / "out"
        error = error_of(capfd, *answering(converted, samples)[command], "--output", output)
        assert re.search(r"out.* cannot be written \((Not a directory|File exists)\); give another output.$", error)

    def test_output_is_the_file_of_samples(self, command, converted, samples, capfd):
        before = samples.read_bytes()
        error = error_of(capfd, *answering(converted, samples)[command], "--output", samples)
        assert str(samples) in error and error.endswith("give another output.") and samples.read_bytes() == before


def test_answers_cannot_be_a_directory(converted, samples, tmp_path, capfd):
    for output in (tmp_path, ""):
        assert "is a directory; give the path of a .jsonl file" in error_of(
            capfd, *answering(converted, samples)["predict"], "--output", output
        )


def test_unknown_metric(converted, samples, capfd):
    error = error_of(capfd, *answering(converted, samples)["eval"], "--metric", "bleu")
    assert error.startswith("There is no metric bleu; choose from exact_match, ")


@pytest.mark.parametrize("command", ["serve", "demo"])
class TestListening:
    @pytest.mark.parametrize("port", ["-1", "65536", "http"])
    def test_no_port(self, command, port, capfd):
        assert status(command, "nowhere", "--port", port) == 2
        assert "Invalid value for '--port'" in capfd.readouterr().err

    @pytest.mark.parametrize("host", ["127.0.0.1", "256.0.0.1", "192.0.2.1"])
    def test_address_is_in_use_or_another_machines(self, command, host, capfd):
        with listen("127.0.0.1", 0) as listener:
            port = listener.getsockname()[1]
            error = error_of(capfd, command, "nowhere", "--host", host, "--port", str(port))
        assert error.startswith(f"Cannot listen on {host}:{port} (") and error.endswith(
            "choose another --port or --host."
        )
