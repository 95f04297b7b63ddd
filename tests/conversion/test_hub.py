# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from florence_vl_hf.cli import main
from florence_vl_hf.conversion import CheckpointError, convert
from florence_vl_hf.conversion.hub import push
from florence_vl_hf.conversion.remote_code import write_remote_code

from ..conftest import FIXTURES, Golden


PHI = Golden(FIXTURES / "phi-small")
TOKEN = "hf_ThisMustStaySecret"
SMALL_FILES = {
    "README.md",
    "chat_template.jinja",
    "chat_templates.py",
    "config.json",
    "configuration_florence_vl.py",
    "generation_config.json",
    "modeling_florence_vl.py",
    "processing_florence_vl.py",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "transformers_compat.py",
}


class FakeHub:
    """In place of the Hub: remembers what it was asked for, in order, and what was sent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.sent: set[str] = set()
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
        self.sent = set(filter_repo_objects(paths, allow_patterns=allow_patterns))


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
def folder(complete: Path, tmp_path: Path) -> Path:
    """A complete model to spoil."""
    return Path(shutil.copytree(complete, tmp_path / "model"))


def edit_json(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    settings = json.loads(path.read_text())
    edit(settings)
    path.write_text(json.dumps(settings))


def status(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    return exit_.value.code


class TestPush:
    def test_sends_the_model_and_nothing_else(self, folder, hub):
        shards = {path.name for path in folder.glob("model-*.safetensors")}
        assert len(shards) > 2
        at_home = [".env", ".git/config", "optimizer.pt", "training_args.bin", "pytorch_model.bin", "runs/events.out"]
        at_home += [
            "checkpoint-5/model.safetensors",
            "checkpoint-5/config.json",
            "secret.json",
            "model.safetensors.bak",
        ]
        for name in at_home:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("not yours")
        (folder / "LICENSE.txt").write_text("A licence")
        files = push(folder, "someone/florence")
        assert hub.sent == SMALL_FILES | shards | {"model.safetensors.index.json", "LICENSE.txt"} == set(files)
        assert hub.calls == ["create_repo", "upload_folder"]
        assert all((folder / name).stat().st_size == size for name, size in files.items())

    def test_dry_run_sends_nothing_and_needs_no_token(self, folder, hub, monkeypatch, capfd):
        monkeypatch.setattr("florence_vl_hf.conversion.hub.get_token", lambda: None)
        assert status("push", folder, "someone/florence", "--dry-run") == 0
        assert hub.calls == []
        *listed, total = capfd.readouterr().out.strip().split("\n")
        sizes = {line.split()[1]: int(line.split()[0].replace(",", "")) for line in listed}
        assert sizes == push(folder, "someone/florence", dry_run=True) and SMALL_FILES < set(sizes)
        assert f"{len(sizes)} files, {sum(sizes.values()):,} bytes" in total and "Nothing was sent" in total

    def test_command_says_where_it_went_but_not_the_token(self, folder, hub, capfd):
        assert status("push", folder, "someone/florence", "--private") == 0
        printed = capfd.readouterr()
        assert "https://huggingface.co/someone/florence" in printed.out
        assert TOKEN not in printed.out + printed.err
        assert hub.private is True

    def test_private_model_never_goes_to_a_public_repository(self, folder, hub):
        hub.existing_is_private = False
        with pytest.raises(ValueError, match="exists and is public"):
            push(folder, "someone/florence", private=True)
        assert "upload_folder" not in hub.calls

    def test_nobody_logged_in(self, folder, hub, monkeypatch):
        monkeypatch.setattr("florence_vl_hf.conversion.hub.get_token", lambda: None)
        with pytest.raises(ValueError, match="hf auth login"):
            push(folder, "someone/florence")
        assert hub.calls == []

    @pytest.mark.parametrize("repo_id", ["florence", "a/b/c", "some one/florence", "../florence"])
    def test_what_is_no_id(self, repo_id, folder, hub):
        with pytest.raises(ValueError, match=r"user/name|[Rr]epo id"):
            push(folder, repo_id)
        assert hub.calls == []


class TestIncomplete:
    def refuse(self, folder: Path, hub: FakeHub, message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            push(folder, "someone/florence")
        assert hub.calls == []

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("config.json", "has no config.json"),
            ("processor_config.json", "has no processor_config.json"),
            ("tokenizer.json", "processor in .* cannot be loaded"),
            ("model-00001-of-*.safetensors", "names the file model-00001-of-.*, which is not in"),
            ("model.safetensors.index.json", "holds no model.safetensors"),
            ("README.md", "has no README.md with metadata"),
            ("chat_templates.py", "for want of code or `auto_map`: chat_templates.py.*write_remote_code"),
        ],
    )
    def test_missing_file(self, name, message, folder, hub):
        next(folder.glob(name)).unlink()
        self.refuse(folder, hub, message)

    def test_original_checkpoint(self, hub):
        self.refuse(PHI.checkpoint, hub, "model type 'llava_phi', expected 'florence_vl'; convert it first")

    def test_tensor_that_neither_shard_nor_index_has(self, folder, hub):
        name = "model.language_model.norm.weight"
        index = folder / "model.safetensors.index.json"
        shard = folder / json.loads(index.read_text())["weight_map"][name]
        save_file({key: tensor for key, tensor in load_file(shard).items() if key != name}, shard)
        edit_json(index, lambda settings: settings["weight_map"].pop(name))
        self.refuse(folder, hub, f"lack 1 tensors of the model, such as {name}")

    def test_shard_cut_short(self, folder, hub):
        shard = next(folder.glob("model-00002-of-*"))
        shard.write_bytes(shard.read_bytes()[:-1000])
        self.refuse(folder, hub, "damaged or incomplete")

    def test_pickles(self, folder, hub):
        tensors = {name: t for shard in folder.glob("model-*") for name, t in load_file(shard).items()}
        for file in folder.glob("model*safetensors*"):
            file.unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
        self.refuse(folder, hub, "holds no model.safetensors")

    def test_processor_of_another_model(self, folder, hub):
        edit_json(folder / "processor_config.json", lambda settings: settings.update(num_image_tokens=7))
        self.refuse(folder, hub, "into 7 tokens .* expects 26")

    @pytest.mark.parametrize("name", ["config.json", "processor_config.json"])
    def test_auto_map_of_elsewhere(self, name, folder, hub):
        """As Transformers writes it for what was loaded from the Hub."""
        elsewhere = {"AutoProcessor": "someone/other--processing_florence_vl.FlorenceVLProcessor"}
        edit_json(folder / name, lambda settings: settings["auto_map"].update(elsewhere))
        self.refuse(folder, hub, f"`auto_map`: {name}")

    @pytest.mark.parametrize(
        ("card", "message"), [("# No metadata\n", "with metadata"), ("---\na: [\n---\n", "cannot be read")]
    )
    def test_card(self, card, message, folder, hub):
        (folder / "README.md").write_text(card)
        self.refuse(folder, hub, message)


def test_trained_model_goes_once_it_has_code_and_card(complete, hub, tmp_path):
    AutoModelForImageTextToText.from_pretrained(complete).save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(complete).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="write_remote_code"):
        push(tmp_path, "someone/florence")
    write_remote_code(tmp_path)
    with pytest.raises(CheckpointError, match="has no README.md"):
        push(tmp_path, "someone/florence")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    assert set(push(tmp_path, "someone/florence")) == hub.sent == SMALL_FILES | {"model.safetensors"}
