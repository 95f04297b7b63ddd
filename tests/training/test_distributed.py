# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Training and inference in two processes, over gloo on the CPU, against one process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from florence_vl_hf import FlorenceVLForConditionalGeneration
from florence_vl_hf.conversion import convert
from florence_vl_hf.training import RECIPES
from tests.conftest import FIXTURES, Golden, llava_sample, tiny_config, tiny_inputs, tiny_model
from tests.training.distributed_worker import (
    IMAGES_PER_SAMPLE,
    STEPS,
    collate,
    history,
    prompt,
    samples,
    train,
    train_recipe,
)


ROOT = Path(__file__).parents[2]
ACCELERATE_FILES = RECIPES / "accelerate"
WORKER = Path(__file__).with_name("distributed_worker.py")
# A process that waits for another one forever is a failure.
TIMEOUT_SECONDS = 150
ACCELERATE = ["accelerate.commands.launch", "--num_processes=2", "--mixed_precision=no"]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
# The checks of each launch, which are functions of distributed_worker.py.
TRAININGS = ["complete", "resumed", "checkpointed", "frozen_tower"]
LAUNCHES = {
    "ddp": [*TRAININGS, "recipe"],
    "fsdp2": [*TRAININGS, "bfloat16", "recipe"],
    "deepspeed_zero2": TRAININGS,
    "deepspeed_zero3": TRAININGS,
}

# A vocabulary size that two processes can divide, as that of converted and assembled models.
TEXT_CONFIGS = {
    family: {**tiny_config().text_config.to_dict(), "model_type": family, "vocab_size": 100}
    for family in ("llama", "phi3")
}
# Phi stores query, key and value in one layer, and gate and up in one: their output is gathered before it is split.
SHARDED_INPUTS = {
    "llama": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"],
    "phi3": ["self_attn.qkv_proj", "mlp.gate_up_proj"],
}


def launch(launcher: list[str], directory: Path, checks: list[str]) -> str:
    """Run checks of the worker in two processes, and return their output. A check that fails leaves no result."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))}
    # The package that is tested here.
    paths = [str(ROOT), *filter(None, sys.path)]
    environment.update(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(paths), TORCH_GLOO_LAZY_INIT="0")
    command = [sys.executable, "-m", *launcher, str(WORKER), str(directory), *checks]
    # A launcher that is terminated, not killed, ends its processes too.
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        try:
            return process.communicate(timeout=TIMEOUT_SECONDS)[0]
        except subprocess.TimeoutExpired:
            process.terminate()
            return f"Nothing within {TIMEOUT_SECONDS} s: a process waits for another.\n{process.communicate()[0]}"


def wait_for(path: Path, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            pytest.fail(f"{path.name} did not appear within {seconds} s.")
        time.sleep(0.05)


class Run:
    """The files and the output of one launch."""

    def __init__(self, directory: Path, output: str) -> None:
        self.directory, self.output = directory, output

    def result(self, check: str) -> dict[str, Any]:
        path = self.directory / f"{check}.json"
        if not path.is_file():
            pytest.fail(
                f"The check {check!r} did not finish. The end of what its processes printed:\n{self.output[-4000:]}"
            )
        return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[float]]]:
    """Losses and norms of gradients of the same trainings in one process."""
    directory = tmp_path_factory.mktemp("alone")
    tiny_model().save_pretrained(directory / "start")
    return {stage: history(train(directory / stage, stage=stage)) for stage in ("pretrain", "finetune")}


def write_recipe(directory: Path) -> None:
    """Settings, data and a model for `florence-vl train`."""
    golden = Golden(FIXTURES / "llama-small")
    convert(golden.checkpoint, directory / "model", vision_tower=golden.vision_tower, dtype=torch.float32)
    # In each step the two processes have different kinds of samples. One sample is broken.
    images = [["odd.jpg"], ["wide.png"], [], [], [], [], ["tall.png", "gray.png"], ["nowhere.png"]]
    samples = [llava_sample(number, names, turns=1 + number % 2) for number, names in enumerate(images)]
    (directory / "data.json").write_text(json.dumps(samples), encoding="utf-8")
    # An odd number, so that one process has nothing to answer when the other one still has.
    (directory / "eval.json").write_text(json.dumps(samples[:3]), encoding="utf-8")
    settings = {
        "model_name_or_path": str(directory / "model"),
        # No dropout: its random numbers differ between processes.
        "stage": "finetune",
        "train_file": str(directory / "data.json"),
        "eval_file": str(directory / "eval.json"),
        "image_folder": str(golden.folder / "images"),
        "use_cpu": True,
        "max_steps": 2,
        "train_sampling_strategy": "sequential",
        "per_device_eval_batch_size": 1,
        "predict_with_generate": True,
        "generation_max_new_tokens": 5,
        "answer_metric": "tests.training.distributed_worker:fingerprint",
        "save_strategy": "no",
        "logging_steps": 1,
        "optim": "sgd",
    }
    (directory / "recipe.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")


def train_in_two(name: str, directory: Path) -> Run:
    tiny_model().save_pretrained(directory / "start")
    if "recipe" in LAUNCHES[name]:
        write_recipe(directory)
    file = f"--config_file={ACCELERATE_FILES / name}.yaml"
    return Run(directory, launch([*ACCELERATE, file], directory, LAUNCHES[name]))


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Trainings in two processes, launched with accelerate/ddp.yaml."""
    return train_in_two("ddp", tmp_path_factory.mktemp("ddp"))


@pytest.fixture(scope="module")
def fsdp2(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """As `ddp`, with accelerate/fsdp2.yaml."""
    return train_in_two("fsdp2", tmp_path_factory.mktemp("fsdp2"))


@pytest.fixture(scope="module")
def deepspeed_zero2(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """As `ddp`, with accelerate/deepspeed_zero2.yaml."""
    pytest.importorskip("deepspeed")
    return train_in_two("deepspeed_zero2", tmp_path_factory.mktemp("deepspeed_zero2"))


@pytest.fixture(scope="module")
def deepspeed_zero3(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """As `ddp`, with accelerate/deepspeed_zero3.yaml."""
    pytest.importorskip("deepspeed")
    return train_in_two("deepspeed_zero3", tmp_path_factory.mktemp("deepspeed_zero3"))


@pytest.fixture(params=list(LAUNCHES))
def run(request: pytest.FixtureRequest) -> Run:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def tensor_parallel(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Every model of `TEXT_CONFIGS`, its language model sharded over two processes."""
    directory = tmp_path_factory.mktemp("tensor_parallel")
    for name, text_config in TEXT_CONFIGS.items():
        tiny_model(text_config=text_config).save_pretrained(directory / "models" / name)
    return Run(directory, launch(TORCHRUN, directory, ["tensor_parallel"]))


def assert_same_training(found: dict[str, Any], expected: dict[str, list[float]], start: int = 0) -> None:
    assert len(found["loss"]) == STEPS
    for name, tolerance in (("loss", 1e-4), ("grad_norm", 1e-3)):
        torch.testing.assert_close(
            torch.tensor(found[name][start:]), torch.tensor(expected[name][start:]), rtol=0, atol=tolerance
        )


@pytest.mark.slow
class TestTraining:
    def test_losses_are_those_of_one_process(self, run: Run, alone: dict[str, dict[str, list[float]]]) -> None:
        assert_same_training(run.result("complete"), alone["pretrain"])

    def test_with_checkpointing_too(self, run: Run, alone: dict[str, dict[str, list[float]]]) -> None:
        assert_same_training(run.result("checkpointed"), alone["pretrain"])

    def test_with_a_frozen_tower_too(self, run: Run, alone: dict[str, dict[str, list[float]]]) -> None:
        assert_same_training(run.result("frozen_tower"), alone["finetune"])

    def test_resumes_where_a_checkpoint_left_off(self, run: Run) -> None:
        # The log before the checkpoint is loaded from it.
        assert_same_training(run.result("resumed"), run.result("complete"), start=STEPS // 2)

    def test_saved_model_loads_bit_equal(self, run: Run) -> None:
        run.result("complete")
        gathered = load_file(run.directory / "gathered.safetensors")
        model = AutoModelForImageTextToText.from_pretrained(run.directory / "saved")
        loaded = dict(model.named_parameters())
        assert loaded.keys() == gathered.keys()
        for name, expected in gathered.items():
            torch.testing.assert_close(loaded[name].detach(), expected, rtol=0, atol=0)

    def test_evaluates_and_answers_as_one_process_does(self, run: Run) -> None:
        result = run.result("complete")
        model = FlorenceVLForConditionalGeneration.from_pretrained(run.directory / "saved").eval()
        for rank in range(2):
            inputs, settings = prompt(model.config, rank)
            if not run.directory.name.startswith("deepspeed_zero3"):  # see the worker
                assert result["answers"][rank] == model.generate(**inputs, **settings).tolist()
        with torch.no_grad():
            loss = model(**collate(samples(steps=2, text_length=6))).loss
        assert result["eval_loss"] == pytest.approx(loss.item(), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_recipe_trains_as_in_one_process(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    run = request.getfixturevalue(name)
    found = run.result("recipe")
    write_recipe(tmp_path)
    expected = train_recipe(tmp_path)
    # Not `eval_loss`, which in Trainer is the mean over batches, and these differ.
    assert found["train_loss"] == pytest.approx(expected["train_loss"], abs=1e-4)
    assert found["eval_number"] == expected["eval_number"] == 3
    assert found["eval_checksum"] == expected["eval_checksum"]
    for directory in (run.directory, tmp_path):
        assert "| skipped | 1 broken sample," in (directory / "trained" / "README.md").read_text(encoding="utf-8")
    trained = [load_file(directory / "trained" / "model.safetensors") for directory in (run.directory, tmp_path)]
    torch.testing.assert_close(*trained, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
class TestFSDP2:
    def test_every_layer_is_sharded_and_gathered_separately(self, fsdp2: Run) -> None:
        result, model = fsdp2.result("complete"), tiny_model()
        assert result["sharded"] == len(list(model.parameters()))
        classes = ("FlorenceVLVisionBlock", "FlorenceVLImageProjection", "BartEncoderLayer", "LlamaDecoderLayer")
        layers = {name for name, module in model.named_modules() if type(module).__name__ in classes}
        assert layers < set(fsdp2.result("complete")["units"])

    def test_bfloat16(self, fsdp2: Run, alone: dict[str, dict[str, list[float]]]) -> None:
        found = fsdp2.result("bfloat16")["loss"]
        torch.testing.assert_close(
            torch.tensor(found), torch.tensor(alone["pretrain"]["loss"][: len(IMAGES_PER_SAMPLE)]), rtol=0, atol=0.05
        )


@pytest.mark.slow
@pytest.mark.parametrize("family", list(TEXT_CONFIGS))
class TestTensorParallel:
    def test_logits_and_answers_are_those_of_one_process(self, tensor_parallel: Run, family: str) -> None:
        tensor_parallel.result(family)
        found = load_file(tensor_parallel.directory / f"{family}.safetensors")
        model = FlorenceVLForConditionalGeneration.from_pretrained(
            tensor_parallel.directory / "models" / family
        ).eval()
        inputs = tiny_inputs(model.config, [1, 0, 2])
        with torch.no_grad():
            torch.testing.assert_close(found["logits"], model(**inputs).logits, rtol=0, atol=1e-5)
        answer = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        assert found["answer"].tolist() == answer.tolist()

    def test_only_the_language_model_is_sharded(self, tensor_parallel: Run, family: str) -> None:
        result = tensor_parallel.result(family)
        linear = ["self_attn.o_proj", "mlp.down_proj", *SHARDED_INPUTS[family]]
        layers = {f"model.language_model.layers.{i}.{name}.weight" for i in range(2) for name in linear}
        assert result["size"] == 2
        # Whether the embeddings are sharded too depends on the version of Transformers.
        assert set(result["sharded"]) - {"model.language_model.embed_tokens.weight"} == {*layers, "lm_head.weight"}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ddp", DistributedType.MULTI_GPU),
        ("fsdp2", DistributedType.FSDP),
        ("deepspeed_zero2", DistributedType.DEEPSPEED),
        ("deepspeed_zero3", DistributedType.DEEPSPEED),
    ],
)
def test_accelerate_reads_every_file(name: str, kind: DistributedType) -> None:
    config = load_config_from_file(str(ACCELERATE_FILES / f"{name}.yaml"))
    assert (config.distributed_type, config.mixed_precision) == (kind, "bf16")


def test_every_accelerate_file_is_tested() -> None:
    names = {path.stem for path in ACCELERATE_FILES.iterdir()}
    assert names == {"ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3"}


class TestSlurm:
    SCRIPT = RECIPES / "slurm" / "pretrain_16_nodes.sbatch"

    @staticmethod
    def commands(directory: Path) -> Path:
        """Replacements: `srun` runs a task for each of two nodes, one after the other, and `accelerate` prints."""
        programs = {
            "python": f'exec {sys.executable} "$@"',
            "scontrol": 'echo "node1"; echo "node2"',
            "srun": 'while [[ $1 == --* ]]; do shift; done\nfor node in 0 1; do SLURM_NODEID=$node "$@"; done',
            "accelerate": 'printf "%s\\n" "$*"',
        }
        directory.mkdir()
        for name, text in programs.items():
            (directory / name).write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
            (directory / name).chmod(0o755)
        return directory

    def test_every_node_starts_its_processes_and_connects_to_the_first(self, tmp_path: Path) -> None:
        slurm = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2"}
        path = os.pathsep.join([str(self.commands(tmp_path / "bin")), os.environ["PATH"]])
        command = ["bash", str(self.SCRIPT), "my recipe.yaml", "--set", "seed=1"]
        found = subprocess.run(
            command,
            env={**os.environ, **slurm, "PATH": path, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        lines = found.stdout.splitlines()
        assert len(lines) == 2
        parser = launch_command_parser()
        for rank, line in enumerate(lines):
            arguments = parser.parse_args(line.removeprefix("launch ").replace("my recipe", "my_recipe").split())
            assert (arguments.num_machines, arguments.num_processes, arguments.machine_rank) == (2, 16, rank)
            assert (arguments.main_process_ip, arguments.main_process_port) == ("node1", 23456)
            assert Path(arguments.config_file) == ACCELERATE_FILES / "fsdp2.yaml"
            assert arguments.module and arguments.training_script == "florence_vl_hf"
            assert arguments.training_script_args == ["train", "my_recipe.yaml", "--set", "seed=1"]

    def test_is_requeued_when_its_time_ends(self, tmp_path: Path) -> None:
        commands = self.commands(tmp_path / "bin")
        (commands / "scontrol").write_text(f'#!/bin/bash\necho "$*" >> {tmp_path}/asked\n', encoding="utf-8")
        (commands / "srun").write_text(f"#!/bin/bash\ntouch {tmp_path}/started\nexec sleep 30\n", encoding="utf-8")
        slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2"}
        path = os.pathsep.join([str(commands), os.environ["PATH"]])
        with subprocess.Popen(
            ["bash", str(self.SCRIPT)],
            env={**os.environ, **slurm, "PATH": path, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,
        ) as process:
            try:
                wait_for(tmp_path / "started")
                process.send_signal(signal.SIGUSR1)
                process.wait(timeout=30)
            finally:
                os.killpg(process.pid, signal.SIGKILL)
        assert "requeue 7" in (tmp_path / "asked").read_text(encoding="utf-8").splitlines()
