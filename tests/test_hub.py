# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from florence_vl_hf.conversion import CheckpointError, convert
from florence_vl_hf.hub import push

from .conftest import FIXTURES, Golden, status


PHI = Golden(FIXTURES / "phi-small")
TOKEN = "hf_ThisMustStaySecret"
SMALL_FILES = {
    "README.md",
    "chat_template.jinja",
    "chat_templates.py",
    "config.json",
    "configuration_florence_vl.py",
    "generation_config.json",
    "generation_florence_vl.py",
    "modeling_florence_vl.py",
    "processing_florence_vl.py",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "transformers_compat.py",
}


class FakeHub:
    """Stands in for the Hub, and records requests in order and uploaded files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.uploaded: set[str] = set()
        self.existing_is_private: bool | None = None
        self.private: bool | None = None
        for name in ("create_repo", "model_info", "upload_folder"):
            monkeypatch.setattr(HfApi, name, getattr(self, name))

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok and repo_id == "someone/florence"
        self.calls.append("create_repo")
        self.private = private if self.existing_is_private is None else self.existing_is_private

    def model_info(self, repo_id: str) -> Any:
        return SimpleNamespace(private=self.private)

    def upload_folder(self, *, repo_id: str, folder_path: Path, allow_patterns: list[str], **kwargs: Any) -> None:
        assert repo_id == "someone/florence"
        self.calls.append("upload_folder")
        paths = [path.relative_to(folder_path).as_posix() for path in folder_path.rglob("*") if path.is_file()]
        self.uploaded = set(filter_repo_objects(paths, allow_patterns=allow_patterns))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return FakeHub(monkeypatch)


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("push") / "complete"
    convert(PHI.checkpoint, output, max_shard_size="500KB")
    return output


@pytest.fixture
def directory(complete: Path, tmp_path: Path) -> Path:
    """A complete model to damage."""
    return Path(shutil.copytree(complete, tmp_path / "model"))


def edit_json(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    settings = json.loads(path.read_text())
    edit(settings)
    path.write_text(json.dumps(settings))


class TestPush:
    def test_uploads_the_model_and_nothing_else(self, directory, hub):
        shards = {path.name for path in directory.glob("model-*.safetensors")}
        assert len(shards) > 2
        left_out = [".env", ".git/config", "optimizer.pt", "training_args.bin", "pytorch_model.bin", "runs/events.out"]
        left_out += [
            "checkpoint-5/model.safetensors",
            "checkpoint-5/config.json",
            "secret.json",
            "model.safetensors.bak",
        ]
        for name in left_out:
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_text("private")
        (directory / "LICENSE.txt").write_text("A licence")
        files = push(directory, "someone/florence")
        assert hub.uploaded == SMALL_FILES | shards | {"model.safetensors.index.json", "LICENSE.txt"} == set(files)
        assert hub.calls == ["create_repo", "upload_folder"]
        assert all((directory / name).stat().st_size == size for name, size in files.items())

    def test_dry_run_uploads_nothing_and_requires_no_token(self, directory, hub, monkeypatch, capfd):
        monkeypatch.setattr("florence_vl_hf.hub.get_token", lambda: None)
        assert status("push", directory, "someone/florence", "--dry-run") == 0
        assert hub.calls == []
        *listed, total = capfd.readouterr().out.strip().split("\n")
        sizes = {line.split()[1]: int(line.split()[0].replace(",", "")) for line in listed}
        assert sizes == push(directory, "someone/florence", dry_run=True) and SMALL_FILES < set(sizes)
        assert f"{len(sizes)} files, {sum(sizes.values()):,} bytes" in total and "Nothing was uploaded" in total

    def test_command_prints_the_address_but_not_the_token(self, directory, hub, capfd):
        assert status("push", directory, "someone/florence", "--private") == 0
        printed = capfd.readouterr()
        assert "https://huggingface.co/someone/florence" in printed.out
        assert TOKEN not in printed.out + printed.err
        assert hub.private is True

    def test_private_model_never_goes_to_a_public_repository(self, directory, hub):
        hub.existing_is_private = False
        with pytest.raises(ValueError, match="exists and is public"):
            push(directory, "someone/florence", private=True)
        assert "upload_folder" not in hub.calls

    def test_without_a_token(self, directory, hub, monkeypatch):
        monkeypatch.setattr("florence_vl_hf.hub.get_token", lambda: None)
        with pytest.raises(ValueError, match="hf auth login"):
            push(directory, "someone/florence")
        assert hub.calls == []

    @pytest.mark.parametrize("repo_id", ["florence", "a/b/c", "some one/florence", "../florence"])
    def test_invalid_repo_id(self, repo_id, directory, hub):
        with pytest.raises(ValueError, match=r"user/name|[Rr]epo id"):
            push(directory, repo_id)
        assert hub.calls == []


class TestIncomplete:
    def refuse(self, directory: Path, hub: FakeHub, message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            push(directory, "someone/florence")
        assert hub.calls == []

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("config.json", "has no config.json"),
            ("processor_config.json", "has no processor_config.json"),
            ("tokenizer.json", "processor in "),
            ("model-00001-of-*.safetensors", "names the file model-00001-of-.*, which is not in"),
            ("model.safetensors.index.json", "has no complete model.safetensors"),
            ("modeling_florence_vl.py", "lacks modeling_florence_vl.py. Load and save the model"),
            ("chat_templates.py", "lacks chat_templates.py. Load and save the model and the processor again"),
        ],
    )
    def test_missing_file(self, name, message, directory, hub):
        next(directory.glob(name)).unlink()
        self.refuse(directory, hub, message)

    def test_original_checkpoint(self, hub):
        self.refuse(PHI.checkpoint, hub, "model type 'llava_phi', expected 'florence_vl'; convert it first")

    def test_tensor_that_neither_shard_nor_index_has(self, directory, hub):
        name = "model.language_model.norm.weight"
        index = directory / "model.safetensors.index.json"
        shard = directory / json.loads(index.read_text())["weight_map"][name]
        save_file({key: tensor for key, tensor in load_file(shard).items() if key != name}, shard)
        edit_json(index, lambda settings: settings["weight_map"].pop(name))
        self.refuse(directory, hub, f"lack 1 tensors of the model, such as {name}")

    def test_truncated_shard(self, directory, hub):
        shard = next(directory.glob("model-00002-of-*"))
        shard.write_bytes(shard.read_bytes()[:-1000])
        self.refuse(directory, hub, "model-00002-of-.* is damaged")

    def test_pickles(self, directory, hub):
        tensors = {name: t for shard in directory.glob("model-*") for name, t in load_file(shard).items()}
        for file in directory.glob("model*safetensors*"):
            file.unlink()
        torch.save(tensors, directory / "pytorch_model.bin")
        self.refuse(directory, hub, "has no complete model.safetensors")

    def test_processor_of_another_model(self, directory, hub):
        edit_json(directory / "processor_config.json", lambda settings: settings.update(num_image_tokens=7))
        self.refuse(directory, hub, "into 7 tokens .* expects 26")

    @pytest.mark.parametrize("name", ["config.json", "processor_config.json"])
    def test_auto_map_of_another_repository(self, name, directory, hub):
        """As Transformers writes it for what was loaded from the Hub."""
        elsewhere = {"AutoProcessor": "someone/other--processing_florence_vl.FlorenceVLProcessor"}
        edit_json(directory / name, lambda settings: settings["auto_map"].update(elsewhere))
        self.refuse(directory, hub, f"lacks `auto_map` in {name}")

    @pytest.mark.parametrize(
        ("card", "error", "message"),
        [
            ("# No metadata\n", CheckpointError, "has no metadata; add it, or remove the file"),
            ("---\na: [\n---\n", ValueError, "README.md has metadata that cannot be read"),
        ],
    )
    def test_unreadable_card(self, card, error, message, directory, hub):
        (directory / "README.md").write_text(card)
        with pytest.raises(error, match=message):
            push(directory, "someone/florence")
        assert hub.calls == [] and (directory / "README.md").read_text() == card


class TestCard:
    def test_saved_model_gets_one(self, complete, hub, tmp_path, caplog):
        AutoModelForImageTextToText.from_pretrained(complete).save_pretrained(tmp_path)
        AutoProcessor.from_pretrained(complete).save_pretrained(tmp_path)

        assert set(push(tmp_path, "someone/florence")) == hub.uploaded == SMALL_FILES | {"model.safetensors"}
        card = ModelCard.load(tmp_path / "README.md")
        assert "# someone/florence" in card.text and card.data.library_name == "transformers"
        assert "README.md, since the model had no card" in caplog.text

    def test_card_of_a_trainer_is_kept(self, directory, hub):
        card = "---\nlibrary_name: transformers\ntags:\n- generated_from_trainer\n---\n# Mine\n"
        (directory / "README.md").write_text(card)
        push(directory, "someone/florence")
        assert (directory / "README.md").read_text() == card

    def test_incomplete_model_gets_none(self, directory):
        (directory / "README.md").unlink()
        (directory / "tokenizer.json").unlink()
        with pytest.raises(CheckpointError):
            push(directory, "someone/florence", dry_run=True)
        assert not (directory / "README.md").exists()


def test_model_saved_by_an_older_version_is_to_be_saved_again(directory, hub):
    for name in SMALL_FILES:
        if name.endswith(".py"):
            (directory / name).unlink()
    edit_json(directory / "processor_config.json", lambda settings: settings.pop("auto_map"))
    with pytest.raises(CheckpointError, match="`auto_map` in processor_config.json and .*py. Load and save"):
        push(directory, "someone/florence")
