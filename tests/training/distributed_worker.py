# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""What test_distributed.py runs in several processes: `distributed_worker.py FOLDER CHECK...`, under a launcher.

Each check leaves `FOLDER/CHECK.json` and perhaps other files. The test itself also runs `train`, in one process.
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
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments

from florence_vl_hf import FlorenceVLConfig, training
from florence_vl_hf.training import read_recipe, set_trainable
from tests.conftest import tiny_config, tiny_inputs


STEPS = 20
ROWS_PER_STEP = 4
# Pictures per row of the steps, in turn. Of two processes, the first has the first two rows of each step: in
# some steps only one process has pictures, and where none has.
PICTURES = [[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 2, 1], [0, 1, 0, 0], [1, 1, 1, 1]]


def rows(steps: int = STEPS, text_length: int | None = None) -> list[dict[str, torch.Tensor]]:
    config, generator = tiny_config(), torch.Generator().manual_seed(0)
    samples = []
    for i in range(steps * ROWS_PER_STEP):
        step, row = divmod(i, ROWS_PER_STEP)
        num_images = PICTURES[step % len(PICTURES)][row]
        # By default the processes differ in how many tokens they have, which the loss has to weigh.
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


def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    def pad(name: str, value: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([sample[name] for sample in samples], True, value)

    batch = {"input_ids": pad("input_ids", 0), "labels": pad("labels", -100)}
    batch["attention_mask"] = (batch["input_ids"] != 0).long()
    pixel_values = [sample["pixel_values"] for sample in samples if "pixel_values" in sample]
    return {**batch, "pixel_values": torch.cat(pixel_values)} if pixel_values else batch


def accelerator_settings() -> dict[str, Any]:
    """Settings of `TrainingArguments` with which accelerate takes this CPU for what it shards over."""
    if "WORLD_SIZE" not in os.environ:
        return {}
    AcceleratorState._reset_state(reset_partial_state=True)
    state = PartialState(cpu=True)
    # accelerate shards over GPUs and their like alone: it is told that this CPU is one. The rest is its own.
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        state.distributed_type = DistributedType.MULTI_GPU
    elif os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
        state.distributed_type = DistributedType.DEEPSPEED
    return {"accelerator_config": {"use_configured_state": True}}


def train_recipe(folder: Path) -> dict[str, float]:
    """Train as the command does: a batch of four over all processes, some samples broken, and answers at the end."""
    recipe = read_recipe(folder / "recipe.yaml", [f"output_dir={folder / 'trained'}"]) | accelerator_settings()
    recipe["per_device_train_batch_size"] = ROWS_PER_STEP // int(os.environ.get("WORLD_SIZE", 1))
    return training.train(recipe)


def fingerprint(answers: list[str], references: list[str]) -> dict[str, float]:
    """A metric that differs if any answer does, whichever process gave it."""
    return {"number": len(references), "checksum": zlib.crc32("|".join(sorted(answers)).encode())}


def train(output: Path, stage: str = "pretrain", resume: bool | str = False, **settings: Any) -> Trainer:
    """Train a tiny model on `rows`, in their order, four per step over all processes."""
    settings = {"max_steps": STEPS, "save_strategy": "no", **accelerator_settings(), **settings}
    arguments = TrainingArguments(
        str(output),
        use_cpu=True,
        per_device_train_batch_size=ROWS_PER_STEP // int(os.environ.get("WORLD_SIZE", 1)),
        per_device_eval_batch_size=ROWS_PER_STEP // int(os.environ.get("WORLD_SIZE", 1)),
        train_sampling_strategy="sequential",
        learning_rate=3e-3,
        logging_steps=1,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to=[],
        **settings,
    )
    # Loaded, and after the arguments: ZeRO-3 divides a model while it is read.
    model = AutoModelForImageTextToText.from_pretrained(output.parent / "start")
    set_trainable(model, stage)
    trainer = Trainer(model, arguments, collate, train_dataset=rows(), eval_dataset=rows(steps=2, text_length=6))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def history(trainer: Trainer) -> dict[str, list[float]]:
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {name: [float(entry[name]) for entry in entries] for name in ("loss", "grad_norm")}


def write(folder: Path, check: str, result: Any) -> None:
    """Result of a check, from the first process."""
    if int(os.environ["RANK"]) == 0:
        (folder / f"{check}.json").write_text(json.dumps(result), encoding="utf-8")


def whole_tensor(parameter: torch.nn.Parameter) -> torch.Tensor:
    """A parameter in full, wherever its parts are."""
    if isinstance(parameter, DTensor):
        return parameter.full_tensor().detach()
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach().clone()


def whole(folder: Path) -> None:
    """A run with a checkpoint on its way; then what it learnt, saved in two ways."""
    trainer = train(folder / "whole", save_strategy="steps", save_steps=STEPS // 2)
    trainer.save_model(str(folder / "saved"))
    state = {name: whole_tensor(parameter) for name, parameter in trainer.model.named_parameters()}
    sharded = sum(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    units = [name for name, module in trainer.model.named_modules() if isinstance(module, FSDPModule)]
    evaluation = trainer.evaluate()["eval_loss"]
    answers: list[Any] = [None, None]
    # Under ZeRO-3 this waits forever: DeepSpeed fetches weights ahead, by what a process did before.
    if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") != "3":
        # Processes with and without a picture, which stop at different steps.
        inputs, settings = prompt(trainer.model.config, int(os.environ["RANK"]))
        answer = trainer.model.eval().generate(**inputs, **settings, synced_gpus=True)
        torch.distributed.all_gather_object(answers, answer.tolist())
    if int(os.environ["RANK"]) == 0:
        save_file(state, folder / "gathered.safetensors")
    result = {"sharded": sharded, "units": units, "eval_loss": evaluation, "answers": answers}
    write(folder, "whole", {**history(trainer), **result})


def prompt(config: FlorenceVLConfig, rank: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return tiny_inputs(config, [1 - rank]), {"max_new_tokens": 8 - 4 * rank, "do_sample": False}


def resumed(folder: Path) -> None:
    checkpoint = folder / "whole" / f"checkpoint-{STEPS // 2}"
    write(folder, "resumed", history(train(folder / "resumed", resume=str(checkpoint))))


def checkpointed(folder: Path) -> None:
    write(folder, "checkpointed", history(train(folder / "checkpointed", gradient_checkpointing=True)))


def frozen_tower(folder: Path) -> None:
    write(folder, "frozen_tower", history(train(folder / "frozen_tower", stage="finetune")))


def bfloat16(folder: Path) -> None:
    write(folder, "bfloat16", history(train(folder / "bfloat16", bf16=True, max_steps=len(PICTURES))))


def recipe(folder: Path) -> None:
    write(folder, "recipe", train_recipe(folder))


def tensor_parallel(folder: Path) -> None:
    """Logits and answers of every model in the folder, each divided over all processes."""
    for path in sorted((folder / "models").iterdir()):
        model = AutoModelForImageTextToText.from_pretrained(path, tp_plan="auto").eval()
        inputs = tiny_inputs(model.config, [1, 0, 2])
        with torch.no_grad():
            logits = model(**inputs).logits
        answer = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        sharded = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
        if int(os.environ["RANK"]) == 0:
            save_file({"logits": logits.contiguous(), "answer": answer}, folder / f"{path.name}.safetensors")
        write(folder, path.name, {"sharded": sharded, "size": model.tp_size})


CHECKS: dict[str, Callable[[Path], None]] = {
    check.__name__: check for check in (whole, resumed, checkpointed, frozen_tower, bfloat16, recipe, tensor_parallel)
}


if __name__ == "__main__":
    for name in sys.argv[2:]:
        CHECKS[name](Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
