# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Compare a model with a recorded reference of the original, check by check."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from ..modeling import FlorenceVLConfig, FlorenceVLForConditionalGeneration
from ..modeling.configuration_florence_vl import IMAGE_FEATURE
from ..processing import IMAGE_TOKEN, FlorenceVLProcessor
from .checkpoint_files import CheckpointError
from .original_processor import LLAVA_ROLES
from .reference import (
    IMAGE_TOKEN_INDEX,
    LOGITS_STRIDE,
    RECORD_SCRIPT,
    Reference,
    expand_image_tokens,
    read_reference,
)


class Tolerances:
    """Largest accepted differences between two float32 computations, absolute unless stated otherwise."""

    pixel_values = 0.018  # one step of 8-bit colour, 1 / 255 / 0.224: image libraries round differently
    mean_pixel_values = 1.8e-5  # one step in a thousandth of the values
    davit = 2e-5  # relative to the largest recorded value, which is about 100
    features = 1e-4
    logits = 2e-3
    loss = 1e-3


class Verdict(StrEnum):
    OK = "ok"
    FAILED = "FAILED"
    NOT_RECORDED = "not recorded"


@dataclass(frozen=True)
class CheckResult:
    """Outcome of one check. The differences are `None` where no values were compared."""

    name: str
    verdict: Verdict
    max_difference: float | None = None
    mean_difference: float | None = None
    note: str = ""


def verify(
    model: FlorenceVLForConditionalGeneration,
    processor: FlorenceVLProcessor,
    reference: str | Path,
    tolerance_factor: float = 1.0,
) -> list[CheckResult]:
    """
    Compare a model with what the original code computed from the same images and token ids.

    Args:
        model (`FlorenceVLForConditionalGeneration`): In float32, as recordings are. It is set to evaluation mode.
        processor (`FlorenceVLProcessor`): Its processor.
        reference (`str` or `Path`): Safetensors file written by `record_reference.py`, with its JSON file and the
            directory `images` beside it.
        tolerance_factor (`float`, *optional*, defaults to 1.0): Multiplies every value of `Tolerances`.

    Raises:
        CheckpointError: If the reference cannot be read, is of another image size, or contains nothing to compare.
    """
    if (model_type := model.config.model_type) != FlorenceVLConfig.model_type:
        raise CheckpointError(f"Got a model of type {model_type!r}, expected {FlorenceVLConfig.model_type!r}.")
    checks = _Checks(model.eval(), processor, read_reference(Path(reference)), tolerance_factor)
    # TensorFloat-32, the default of convolutions on a GPU, is a thousand times coarser than the tolerances.
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        results = list(checks.run())
    # An equal number of image tokens proves nothing.
    if agrees(results) and not any(result.verdict is Verdict.OK for result in results[1:]):
        raise CheckpointError(f"{reference} contains nothing to compare; record it with `python {RECORD_SCRIPT}`.")
    return results


def agrees(results: list[CheckResult]) -> bool:
    """Return whether no check failed."""
    return all(result.verdict is not Verdict.FAILED for result in results)


def format_results(results: list[CheckResult]) -> str:
    """Format results as a table with a summary in its last line."""
    width, count = max(len(result.name) for result in results), Counter(result.verdict for result in results)
    lines = [f"{'check':<{width}}  max difference  mean difference  verdict"]
    for result in results:
        numbers = ["-" if n is None else f"{n:.2e}" for n in (result.max_difference, result.mean_difference)]
        verdict = f"{result.verdict}: {result.note}" if result.note else result.verdict
        lines.append(f"{result.name:<{width}}  {numbers[0]:>14}  {numbers[1]:>15}  {verdict}")
    failed, missing = count[Verdict.FAILED], count[Verdict.NOT_RECORDED]
    num_compared = len(results) - missing
    summary = f"{failed} of {num_compared} checks failed" if failed else f"All {num_compared} checks passed"
    return "\n".join([*lines, f"{summary}, {missing} not recorded." if missing else f"{summary}."])


@dataclass
class _Checks:
    """The checks of one model against one reference."""

    model: FlorenceVLForConditionalGeneration
    processor: FlorenceVLProcessor
    reference: Reference
    tolerance_factor: float

    def run(self) -> Iterator[CheckResult]:
        self.config: FlorenceVLConfig = self.model.config
        self.pixels = self.reference.load("pixel_values")
        yield self.image_tokens()
        yield self.pixel_values()
        if self.pixels is not None and self.pixels.shape[1:] != (3, self.config.image_size, self.config.image_size):
            self.pixels = None  # of another model
        yield from self.features()
        yield from self.forwards()
        yield self.generations()
        yield self.token_ids()

    def compare(
        self, name: str, recorded: torch.Tensor | None, computed: torch.Tensor | None, limit: float, mean: float = 1.0
    ) -> CheckResult:
        """Compare two tensors. Either is `None` if it, or what it is computed from, is not recorded."""
        if recorded is None or computed is None:
            return CheckResult(name, Verdict.NOT_RECORDED)
        if computed.shape != recorded.shape or not recorded.numel():
            note = f"recorded as {tuple(recorded.shape)}, the model gives {tuple(computed.shape)}"
            return CheckResult(name, Verdict.FAILED, note=note)
        difference = (computed.cpu().float() - recorded.float()).abs()
        largest, average = difference.max().item(), difference.double().mean().item()
        # NaN is not close.
        is_close = largest <= self.tolerance_factor * limit and average <= self.tolerance_factor * mean
        return CheckResult(name, Verdict.OK if is_close else Verdict.FAILED, largest, average)

    def image_tokens(self) -> CheckResult:
        tensor = self.reference.tensors.get("image_feature") or self.reference.tensors.get("projected")
        if tensor is None or tensor.shape[1] == self.config.num_feature_tokens:
            return CheckResult("image tokens", Verdict.NOT_RECORDED if tensor is None else Verdict.OK)
        count = self.config.feature_grid_size**2
        note = (
            f"{self.config.num_feature_tokens} per image instead of {tensor.shape[1]}; convert it again: "
            f"--image-feature-source temporal_avg_pool gives {count}, spatial_avg_pool,temporal_avg_pool {count + 1}"
        )
        return CheckResult("image tokens", Verdict.FAILED, note=note)

    def pixel_values(self) -> CheckResult:
        paths, recorded, computed = self.reference.images, self.pixels, None
        if recorded is not None and paths and all(path.is_file() for path in paths):
            images = [Image.open(path) for path in paths[: len(recorded)]]
            computed = torch.cat([self.processor.image_processor(i, return_tensors="pt").pixel_values for i in images])
            recorded = recorded[: len(computed)]
        return self.compare("pixel values", recorded, computed, Tolerances.pixel_values, Tolerances.mean_pixel_values)

    def features(self) -> Iterator[CheckResult]:
        """Compare DaViT's feature map, V, V't of each prompt and the projection, of the images that are recorded."""
        load, prompts = self.reference.load, self.config.fusion_prompts
        recorded = {"davit": load("davit"), IMAGE_FEATURE: load("image_feature"), "projected": load("projected")}
        if prompts and (encoded := load("encoder_last_hidden_state")) is not None:
            recorded |= zip(prompts, encoded.tensor_split(len(prompts), dim=-1), strict=True)
        computed = {} if self.pixels is None else self.encode_images(self.pixels)
        if computed and (davit := recorded["davit"]) is not None:
            recorded["davit"], computed["davit"] = davit / davit.abs().max(), computed["davit"] / davit.abs().max()
        labels = {"davit": "DaViT (relative)"}
        for name in self.config.fusion_features or []:
            labels[name] = "V" if name == IMAGE_FEATURE else f"V't{prompts.index(name) + 1} ({name})"
        for name, label in {**labels, "projected": "projection"}.items():
            expected, found = recorded.get(name), computed.get(name)
            if expected is not None and found is not None:
                expected, found = expected[: len(found)], found[: len(expected)]
            yield self.compare(label, expected, found, Tolerances.davit if name == "davit" else Tolerances.features)

    def encode_images(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        batches = defaultdict(list)
        # One by one: DaViT's first feature maps of a 768 x 768 image take hundreds of megabytes.
        for pixels in tqdm(pixel_values.split(1), desc="Images", leave=False):
            pixels = pixels.to(self.model.device, self.model.dtype)
            output = self.model.get_image_features(pixels, output_hidden_states=True, return_dict=True)
            batches["davit"].append(output.hidden_states[-1].flatten(2).transpose(1, 2).cpu())
            batches["projected"].append(torch.stack(list(output.pooler_output)).cpu())
            for name, feature in output.features.items():
                batches[name].append(feature.cpu())
        return {name: torch.cat(parts) for name, parts in batches.items()}

    def forwards(self) -> Iterator[CheckResult]:
        """Compare the logits of each recorded sample, and the loss of each batch. Batches are padded on the right."""
        for i, forward in enumerate(tqdm(self.reference.record["forwards"], desc="Forwards", leave=False)):
            logits, losses, num_labels = self.reference.load(f"forward{i}.logits"), [], 0
            masks = forward.get("attention_mask") or [[1] * len(ids) for ids in forward["input_ids"]]
            all_labels = forward.get("labels") or [[]] * len(masks)
            for j, (row, ids, mask) in enumerate(zip(forward["rows"], forward["input_ids"], masks, strict=False)):
                recorded = computed = None
                ids = ids[: sum(mask)]
                if logits is not None and (inputs := self.inputs(ids, row["image"])):
                    recorded = logits[j : j + 1, : inputs["input_ids"].shape[1]]
                    # The original has no entries for `<image>`.
                    computed = self.model(**inputs).logits
                    if labels := self.labels(ids, all_labels[j]):
                        pairs = (computed[0, :-1].float().cpu(), torch.tensor(labels)[1:])
                        losses.append(nn.functional.cross_entropy(*pairs, ignore_index=-100, reduction="sum"))
                        num_labels += sum(label != -100 for label in labels[1:])
                    computed = computed[..., ::LOGITS_STRIDE][..., : logits.shape[-1]]
                yield self.compare(f"logits {i} ({row['image']})", recorded, computed, Tolerances.logits)
            if "loss" in forward:
                is_complete = len(losses) == len(masks) and num_labels > 0
                loss = torch.stack(losses).sum() / num_labels if is_complete else None
                yield self.compare(f"loss {i}", torch.tensor(forward["loss"]), loss, Tolerances.loss)

    def labels(self, ids: list[int], labels: list[int]) -> list[int]:
        """Return the labels of a sample, with one per image token for each of the original's placeholders."""
        counts = [self.config.num_image_tokens if i == IMAGE_TOKEN_INDEX else 1 for i in ids]
        return [label for label, count in zip(labels, counts, strict=False) for _ in range(count)]

    def generations(self) -> CheckResult:
        """Compare the tokens of greedy decoding, as many as were recorded."""
        pairs = {}
        for i, generation in enumerate(tqdm(self.reference.record["generations"], desc="Generations", leave=False)):
            recorded = generation["generated_ids"]
            if recorded and (inputs := self.inputs(generation["chat_input_ids"], generation["image"])):
                output_ids = self.model.generate(**inputs, max_new_tokens=len(recorded), do_sample=False, num_beams=1)
                computed = output_ids[0, inputs["input_ids"].shape[1] :].tolist()
                pairs[f"answer {i}, {generation['image']}"] = (recorded, computed)
        return _compare_ids("greedy tokens", pairs)

    def token_ids(self) -> CheckResult:
        """Compare the token ids of dialogs with those of the processor's chat template."""
        pairs = {}
        for i, dialog in enumerate(self.reference.record["dialogs"]):
            messages = [_message(turn) for turn in dialog["conversations"]]
            prompt = messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
            for key, conversation in (("train_input_ids", messages), ("chat_input_ids", prompt)):
                if conversation and dialog.get(key):
                    computed = self.processor.apply_chat_template(
                        conversation, tokenize=True, return_dict=True, add_generation_prompt=key == "chat_input_ids"
                    )
                    recorded = expand_image_tokens(dialog[key], self.config)
                    pairs[f"{key} of dialog {i}"] = (recorded, computed["input_ids"][0])
        return _compare_ids("token ids", pairs)

    def inputs(self, token_ids: list[int], image: str) -> dict[str, torch.Tensor] | None:
        """Return the model's inputs for a recorded sample, `None` if token ids or pixel values are missing."""
        if not token_ids:
            return None
        inputs = {"input_ids": torch.tensor([expand_image_tokens(token_ids, self.config)])}
        if num_images := token_ids.count(IMAGE_TOKEN_INDEX):
            names = [path.name for path in self.reference.images]
            if self.pixels is None or image not in names[: len(self.pixels)]:
                return None
            inputs["pixel_values"] = self.pixels[[names.index(image)] * num_images].to(self.model.dtype)
        return {name: tensor.to(self.model.device) for name, tensor in inputs.items()}


def _compare_ids(name: str, pairs: dict[str, tuple[list[int], list[int]]]) -> CheckResult:
    """Compare pairs of recorded and computed token ids."""
    for label, (recorded, computed) in pairs.items():
        for i, (expected, found) in enumerate(zip_longest(recorded, computed)):
            if found != expected:
                note = f"{label} has {found} instead of {expected} at token {i}"
                return CheckResult(name, Verdict.FAILED, note=note)
    return CheckResult(name, Verdict.OK if pairs else Verdict.NOT_RECORDED)


def _message(turn: dict[str, str]) -> dict[str, Any]:
    """Return a recorded turn as a message with blank images: the token ids of an image do not depend on it."""
    images = [{"type": "image", "image": Image.new("RGB", (8, 8))}] * turn["value"].count(IMAGE_TOKEN)
    text = {"type": "text", "text": turn["value"].replace(IMAGE_TOKEN, "")}
    return {"role": LLAVA_ROLES.get(turn["from"], turn["from"]), "content": [*images, text]}


__all__ = ["CheckResult", "Tolerances", "Verdict", "agrees", "format_results", "verify"]
