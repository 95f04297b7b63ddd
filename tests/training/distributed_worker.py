# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Checks that test_distributed.py launches in several processes: `distributed_worker.py DIRECTORY CHECK...`.

Each check writes `DIRECTORY/CHECK.json`, and may write other files. The test also runs `train` in one process.
"""

import json
import os
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForImageTextToText, Trainer

from florence_vl_hf import FlorenceVLConfig, training
from florence_vl_hf.training import FlorenceVLTrainer, FlorenceVLTrainingArguments, read_recipe, set_trainable
from florence_vl_hf.training.arguments import CHECKPOINTING
from tests.conftest import tiny_config, tiny_inputs


STEPS = 20
SAMPLES_PER_STEP = 4
# Images of each sample of a step, repeated. Of two processes, the first one has the first two samples of each step: in
# some steps only one process has images, or none.
IMAGES_PER_SAMPLE = [[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 2, 1], [0, 1, 0, 0], [1, 1, 1, 1]]


def samples(steps: int = STEPS, text_length: int | None = None) -> list[dict[str, torch.Tensor]]:
    config, generator = tiny_config(), torch.Generator().manual_seed(0)
    samples = []
    for i in range(steps * SAMPLES_PER_STEP):
        step, position = divmod(i, SAMPLES_PER_STEP)
        num_images = IMAGES_PER_SAMPLE[step % len(IMAGES_PER_SAMPLE)][position]
        # By default the processes have different numbers of tokens, which the loss must take into account.
        text = torch.randint(3, 90, (text_length or 4 + i % 5,), generator=generator)
        image = torch.full((num_images * config.num_image_tokens,), config.image_token_id)
        sample = {"input_ids": torch.cat([image, text])}
        sample["labels"] = sample["input_ids"].clone()
        sample["labels"][: len(image) + 1] = -100
        if num_images:
            sample["pixel_values"] = torch.randn(
                num_images, 3, config.image_size, config.image_size, generator=generator
            )
        samples.append(sample)
    return samples


class Collator:
    """Pads samples that are tokenized already, in place of `FlorenceVLCollator`."""

    processor = None
    num_skipped = 0

    def __call__(self, samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return collate(samples)


def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    def pad(name: str, value: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([sample[name] for sample in samples], True, value)

    batch = {"input_ids": pad("input_ids", 0), "labels": pad("labels", -100)}
    batch["attention_mask"] = (batch["input_ids"] != 0).long()
    pixel_values = [sample["pixel_values"] for sample in samples if "pixel_values" in sample]
    return {**batch, "pixel_values": torch.cat(pixel_values)} if pixel_values else batch


def accelerator_settings() -> dict[str, Any]:
    """Settings of `TrainingArguments` that make accelerate shard over CPU processes."""
    if "WORLD_SIZE" not in os.environ:
        return {}
    AcceleratorState._reset_state(reset_partial_state=True)
    state = PartialState(cpu=True)
    # accelerate only shards over accelerators, so this CPU is declared to be one. The rest is its own code.
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        state.distributed_type = DistributedType.MULTI_GPU
    elif os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
        state.distributed_type = DistributedType.DEEPSPEED
    return {"accelerator_config": {"use_configured_state": True}}


def train_recipe(directory: Path) -> dict[str, float]:
    """Train as the command line does, with a batch of four over all processes."""
    recipe = read_recipe(directory / "recipe.yaml", [f"output_dir={directory / 'trained'}"]) | accelerator_settings()
    recipe["per_device_train_batch_size"] = SAMPLES_PER_STEP // int(os.environ.get("WORLD_SIZE", 1))
    return training.train(recipe)


def fingerprint(answers: list[str], references: list[str]) -> dict[str, float]:
    """A metric that differs if any answer differs, independent of the process that generated it."""
    return {"number": len(references), "checksum": zlib.crc32("|".join(sorted(answers)).encode())}


def train(output: Path, stage: str = "pretrain", resume: bool | str = False, **settings: Any) -> Trainer:
    """Train a tiny model on `samples`, in order, four per step over all processes."""
    settings = {"max_steps": STEPS, "save_strategy": "no", **accelerator_settings(), **settings}
    arguments = FlorenceVLTrainingArguments(
        str(output),
        use_cpu=True,
        per_device_train_batch_size=SAMPLES_PER_STEP // int(os.environ.get("WORLD_SIZE", 1)),
        per_device_eval_batch_size=SAMPLES_PER_STEP // int(os.environ.get("WORLD_SIZE", 1)),
        train_sampling_strategy="sequential",
        learning_rate=3e-3,
        logging_steps=1,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to=[],
        **settings,
    )
    # Loaded after the arguments are created: ZeRO-3 shards a model while it is loaded.
    model = AutoModelForImageTextToText.from_pretrained(output.parent / "start")
    set_trainable(model, stage)
    trainer = FlorenceVLTrainer(
        model, arguments, Collator(), train_dataset=samples(), eval_dataset=samples(steps=2, text_length=6)
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def history(trainer: Trainer) -> dict[str, list[float]]:
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {name: [float(entry[name]) for entry in entries] for name in ("loss", "grad_norm")}


def write(directory: Path, check: str, result: Any) -> None:
    """Write the result of a check, in the first process."""
    if int(os.environ["RANK"]) == 0:
        (directory / f"{check}.json").write_text(json.dumps(result), encoding="utf-8")


def full_tensor_of(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Gather a parameter."""
    if isinstance(parameter, DTensor):
        return parameter.full_tensor().detach()
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach().clone()


def complete(directory: Path) -> None:
    """A run with a checkpoint, whose model is then saved in two ways, evaluated and used for generation."""
    trainer = train(directory / "complete", save_strategy="steps", save_steps=STEPS // 2)
    trainer.save_model(str(directory / "saved"))
    state = {name: full_tensor_of(parameter) for name, parameter in trainer.model.named_parameters()}
    sharded = sum(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    units = [name for name, module in trainer.model.named_modules() if isinstance(module, FSDPModule)]
    evaluation = trainer.evaluate()["eval_loss"]
    answers: list[Any] = [None, None]
    # With ZeRO-3 this hangs: DeepSpeed prefetches weights in the order of earlier forward passes.
    if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") != "3":
        # Processes with and without an image, which stop at different steps.
        inputs, settings = prompt(trainer.model.config, int(os.environ["RANK"]))
        answer = trainer.model.eval().generate(**inputs, **settings, synced_gpus=True)
        torch.distributed.all_gather_object(answers, answer.tolist())
    if int(os.environ["RANK"]) == 0:
        save_file(state, directory / "gathered.safetensors")
    result = {"sharded": sharded, "units": units, "eval_loss": evaluation, "answers": answers}
    write(directory, "complete", {**history(trainer), **result})


def prompt(config: FlorenceVLConfig, rank: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return tiny_inputs(config, [1 - rank]), {"max_new_tokens": 8 - 4 * rank, "do_sample": False}


def resumed(directory: Path) -> None:
    checkpoint = directory / "complete" / f"checkpoint-{STEPS // 2}"
    write(directory, "resumed", history(train(directory / "resumed", resume=str(checkpoint))))


def checkpointed(directory: Path) -> None:
    write(directory, "checkpointed", history(train(directory / "checkpointed", **{CHECKPOINTING: True})))


def frozen_tower(directory: Path) -> None:
    write(directory, "frozen_tower", history(train(directory / "frozen_tower", stage="finetune")))


def bfloat16(directory: Path) -> None:
    write(directory, "bfloat16", history(train(directory / "bfloat16", bf16=True, max_steps=len(IMAGES_PER_SAMPLE))))


def recipe(directory: Path) -> None:
    write(directory, "recipe", train_recipe(directory))


def tensor_parallel(directory: Path) -> None:
    """Logits and answers of every model in the directory, each sharded over all processes."""
    for path in sorted((directory / "models").iterdir()):
        model = AutoModelForImageTextToText.from_pretrained(path, tp_plan="auto").eval()
        inputs = tiny_inputs(model.config, [1, 0, 2])
        with torch.no_grad():
            logits = model(**inputs).logits
        answer = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        sharded = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
        if int(os.environ["RANK"]) == 0:
            save_file({"logits": logits.contiguous(), "answer": answer}, directory / f"{path.name}.safetensors")
        write(directory, path.name, {"sharded": sharded, "size": model.tp_size})


CHECKS: dict[str, Callable[[Path], None]] = {
    check.__name__: check
    for check in (complete, resumed, checkpointed, frozen_tower, bfloat16, recipe, tensor_parallel)
}


if __name__ == "__main__":
    for name in sys.argv[2:]:
        CHECKS[name](Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
