# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Run every code block of the documentation, in a directory with tiny models under the names that the pages use."""

import base64
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from configparser import ConfigParser
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from huggingface_hub.utils import httpx
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Dinov2Config,
    Florence2ForConditionalGeneration,
    GenerationConfig,
)
from typer.testing import CliRunner

from florence_vl_cli import app
from florence_vl_cli.serve import listen
from florence_vl_hf import FlorenceVLConfig, FlorenceVLForConditionalGeneration
from florence_vl_hf.conversion import convert
from florence_vl_hf.evaluation import load_questions
from florence_vl_hf.training import read_recipe
from florence_vl_hf.training.arguments import find_recipe

from ..conftest import FIXTURES, Golden, llava_sample
from ..conversion.test_assemble_florence_vl import save_llm, save_tower_tokenizer


ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LLAMA, PHI = Golden(FIXTURES / "llama-small"), Golden(FIXTURES / "phi-small")
EXTRAS = ConfigParser()
EXTRAS.read(ROOT / "setup.cfg")


def code_blocks(page: Path) -> list[tuple[str, str]]:
    return re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def copy_original(golden: Golden, directory: Path) -> None:
    shutil.copytree(golden.checkpoint, directory)
    if golden.vision_tower is not None:
        shutil.copytree(golden.vision_tower, directory / "vision_tower")


def save_wide_model(directory: Path) -> None:
    """Save a model wide enough for the 4-bit matrix products of bitsandbytes, whose answers are short."""
    convert(LLAMA.checkpoint, directory, LLAMA.vision_tower)
    config = FlorenceVLConfig.from_pretrained(directory)
    config.text_config.update({"hidden_size": 128, "intermediate_size": 128})
    model = FlorenceVLForConditionalGeneration(config).to(torch.bfloat16)
    model.generation_config = GenerationConfig.from_pretrained(directory)
    model.generation_config.eos_token_id = [2, *range(200, config.image_token_id)]
    model.save_pretrained(directory)


def save_encoders(directory: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    for name, config in {
        "openai/clip-vit-large-patch14-336": CLIPVisionConfig(**sizes, intermediate_size=16),
        "facebook/dinov2-large": Dinov2Config(**sizes),
    }.items():
        AutoModel.from_config(config).save_pretrained(directory / name)
        CLIPImageProcessorPil(size=28, crop_size=28).save_pretrained(directory / name)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages assume to exist, relative to the working directory. Hub ids are directories here."""
    directory = tmp_path_factory.mktemp("docs")
    for golden, name in ((LLAMA, "8b-sft"), (LLAMA, "8b-pretrain"), (PHI, "3b-pretrain")):
        copy_original(golden, directory / f"jiuhai/florence-vl-{name}")
    save_wide_model(directory / "florence-vl-8b-sft-hf")
    tower = directory / "microsoft/Florence-2-large-ft"
    config = FlorenceVLConfig.from_pretrained(directory / "florence-vl-8b-sft-hf").vision_config
    Florence2ForConditionalGeneration(config).save_pretrained(tower)
    shutil.copy(LLAMA.vision_tower / "preprocessor_config.json", tower)
    save_tower_tokenizer(tower)
    shutil.copytree(tower, directory / "microsoft/Florence-2-large")
    save_llm(directory / "microsoft/Phi-3.5-mini-instruct", "phi3")
    save_llm(directory / "meta-llama/Llama-3.1-8B", "llama")
    save_encoders(directory)

    shutil.copytree(LLAMA.folder / "images", directory / "photos")
    shutil.copytree(LLAMA.folder / "images", directory / "data/images")
    for name in ("street", "sign"):
        shutil.copy(LLAMA.image_path("odd.jpg"), directory / f"{name}.jpg")
    names = LLAMA.reference["images"]
    samples = [llava_sample(i, names[i : i + (1, 0, 2)[i % 3]]) for i in range(4)]
    for name in ("mine", "finetune"):
        (directory / f"data/{name}.json").write_text(json.dumps(samples))
    shutil.copytree(LLAMA.folder / "images", directory, dirs_exist_ok=True)
    (directory / "questions.jsonl").write_text("\n".join(map(json.dumps, samples)))

    pairs = [{"image": f"pairs/{i}.png", "caption": f"Number {i}."} for i in range(20)]
    (directory / "pairs").mkdir()
    for i, pair in enumerate(pairs):
        Image.new("RGB", (64, 64), (12 * i, 100, 200)).save(directory / pair["image"])
    (directory / "pairs.json").write_text(json.dumps(pairs))
    grid = {"variants": {"average": {"fusion_strategy": "average"}}, "seeds": [0], "max_steps": 1}
    grid |= {
        "model_name_or_path": "florence-vl-8b-sft-hf",
        "train_file": "data/mine.json",
        "image_folder": "data/images",
    }
    grid |= {"eval_file": "data/mine.json", "output_dir": "runs/grid", "generation_max_new_tokens": 2}
    (directory / "grid.yaml").write_text(json.dumps(grid))

    # A projector trained by the original.
    (directory / "my-projector").mkdir()
    tensors = {}
    for shard in LLAMA.checkpoint.glob("*.safetensors"):
        tensors |= {name: tensor for name, tensor in load_file(shard).items() if "mm_projector" in name}
    torch.save(tensors, directory / "my-projector/mm_projector.bin")
    return directory


class Reader:
    """Someone who types what a page says."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.names: dict[str, object] = {"__name__": "__main__"}
        self.servers: list[subprocess.Popen] = []
        with listen("127.0.0.1", 0) as listener:
            self.port = str(listener.getsockname()[1])

    def read(self, language: str, text: str) -> None:
        text = text.replace("8000", self.port)
        if language == "python" and "torchrun" in text:
            self.run("-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python", sys.executable, "-c", text)
        elif language == "python":
            image = base64.b64encode((self.directory / "street.jpg").read_bytes()).decode()
            exec(text.replace("https://example.org/street.jpg", f"data:image/jpeg;base64,{image}"), self.names)
        elif language == "bash":
            for line in text.replace("\\\n", "").splitlines():
                self.type(line)
        elif language == "yaml":
            (self.directory / "recipe.yaml").write_text(text)
            assert read_recipe("recipe.yaml")
        elif language == "json":
            (self.directory / "sample.json").write_text(f"[{text}]")
            assert len(load_questions("sample.json")) == 1
        else:
            pytest.fail(f"{language} is not tested")

    def type(self, line: str) -> None:
        """Run a line of a shell, or check what would be installed or started on other machines."""
        if variable := re.match(r"(\w+)=\$\((.*)\)$", line):
            command = shlex.split(variable[2].replace("python", sys.executable, 1))
            os.environ[variable[1]] = subprocess.check_output(command, text=True).strip()
            return
        words = shlex.split(os.path.expandvars(line), comments=True)
        match words:
            case []:
                pass
            case ["pip", "install", *packages]:
                for extras in re.findall(r"\.\[(.+?)\]", " ".join(packages)):
                    assert all(EXTRAS.has_option("options.extras_require", name) for name in extras.split(","))
            case ["make", target]:
                assert f"\n{target}:" in (ROOT / "Makefile").read_text()
            case ["sbatch", script, recipe]:  # tests/training/test_distributed.py runs it
                assert Path(script).is_file() and find_recipe(recipe)
            case ["vllm", "serve", *_]:  # `make test-vllm` parses the options
                pass
            case ["accelerate", "launch", *options]:
                module = launch_command_parser().parse_args(options)
                if module.training_script == "florence_vl_hf":
                    self.run_command(module.training_script_args)
                else:  # `make test-lmms-eval` checks its arguments
                    assert module.training_script == "lmms_eval"
            case ["florence-vl", "serve" | "demo", *_]:
                self.start(words[1:])
            case ["florence-vl", *arguments]:
                self.run_command(arguments)
            case ["python", *arguments]:
                self.run(*arguments)
            case _:
                pytest.fail(f"No test runs {line}")

    def run(self, *arguments: str) -> None:
        subprocess.run([sys.executable, *arguments], check=True)

    def run_command(self, arguments: list[str]) -> None:
        if arguments[0] == "convert":
            shutil.rmtree(self.directory / arguments[2], ignore_errors=True)
        if arguments[0] in ("train", "ablate"):
            arguments = [*arguments, "--set", "use_cpu=true"]
        result = CliRunner().invoke(app, arguments, input="What is it?\n/exit\n", obj={"traceback": True})
        assert result.exit_code == 0, (arguments, result.output, result.exception)

    def start(self, arguments: list[str]) -> None:
        self.stop()
        if "--port" not in arguments:
            arguments = [*arguments, "--port", self.port]
        self.servers.append(subprocess.Popen([sys.executable, "-m", "florence_vl_hf", *arguments]))
        path = "/health" if arguments[0] == "serve" else "/"
        for _ in range(600):
            assert self.servers[-1].poll() is None
            try:
                if httpx.get(f"http://127.0.0.1:{self.port}{path}").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.2)
        pytest.fail(f"{arguments} does not answer")

    def stop(self) -> None:
        while self.servers:
            server = self.servers.pop()
            server.send_signal(signal.SIGINT)
            assert server.wait(60) == 0


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page(page, prepared, tmp_path, monkeypatch):
    if page.stem == "quantization":
        pytest.importorskip("torchao")
    directory = tmp_path / "reader"
    shutil.copytree(prepared, directory)
    monkeypatch.chdir(directory)
    monkeypatch.setenv("RECIPES", "")  # restored afterwards
    reader = Reader(directory)
    try:
        for language, text in code_blocks(page):
            reader.read(language, text)
    finally:
        reader.stop()
