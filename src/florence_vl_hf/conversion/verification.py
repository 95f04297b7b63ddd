# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Compare a model with a recorded reference of the original, check by check."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from ..modeling import FlorenceVLConfig, FlorenceVLForConditionalGeneration
from ..modeling.configuration_florence_vl import IMAGE_FEATURE
from ..processing import IMAGE_TOKEN, FlorenceVLProcessor
from .checkpoint_files import CheckpointError
from .original_processor import LLAVA_ROLES
from .reference import IMAGE_TOKEN_INDEX, LOGITS_STRIDE, RECORD_SCRIPT, Reference, forward_inputs, read_reference


# DaViT's first feature maps of one 768 x 768 image take hundreds of megabytes.
IMAGES_PER_BATCH = 2


@dataclass(frozen=True)
class Tolerances:
    """Largest accepted differences between two float32 computations, absolute unless stated otherwise."""

    pixel_values: float = 0.018  # one step of 8-bit colour, 1 / 255 / 0.224: image libraries round differently
    unequal_pixel_values: float = 1e-3  # share of the values that differ by more than 1e-6
    davit: float = 2e-5  # relative to the largest recorded value, which is about 100
    features: float = 1e-4
    logits: float = 2e-3
    loss: float = 1e-3


class Verdict(StrEnum):
    OK = "ok"
    FAILED = "FAILED"
    NOT_RECORDED = "not recorded"
    NOT_COMPARABLE = "not comparable"


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
        CheckpointError: If the reference cannot be read, or contains nothing to compare.
    """
    if (model_type := model.config.model_type) != FlorenceVLConfig.model_type:
        raise CheckpointError(f"Got a model of type {model_type!r}, expected {FlorenceVLConfig.model_type!r}.")
    tolerances = Tolerances(**{name: tolerance_factor * value for name, value in asdict(Tolerances()).items()})
    checks = _Checks(model.eval(), processor, read_reference(Path(reference)), tolerances)
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
    rows = [("check", "max difference", "mean difference", "verdict")]
    for result in results:
        numbers = ["-" if n is None else f"{n:.2e}" for n in (result.max_difference, result.mean_difference)]
        verdict = ": ".join(filter(None, (result.verdict, result.note)))
        rows.append((result.name, numbers[0], numbers[1], verdict))
    width = max(len(row[0]) for row in rows)
    lines = [f"{row[0]:<{width}}  {row[1]:>14}  {row[2]:>15}  {row[3]}" for row in rows]
    count = Counter(result.verdict for result in results)
    num_failed, num_compared = count[Verdict.FAILED], count[Verdict.FAILED] + count[Verdict.OK]
    summary = [f"{num_failed} of {num_compared} checks failed" if num_failed else f"All {num_compared} checks passed"]
    summary += [f"{count[v]} {v}" for v in (Verdict.NOT_RECORDED, Verdict.NOT_COMPARABLE) if count[v]]
    return "\n".join([*lines, ", ".join(summary) + "."])


def _compare(
    name: str, recorded: torch.Tensor | None, computed: torch.Tensor | str, tolerance: float, relative: bool = False
) -> CheckResult:
    """Compare a recorded tensor with a computed one, or with the reason why there is none."""
    if recorded is None:
        return CheckResult(name, Verdict.NOT_RECORDED)
    if isinstance(computed, str):
        return CheckResult(name, Verdict.NOT_COMPARABLE, note=computed)
    if computed.shape != recorded.shape or not recorded.numel():
        note = f"recorded as {tuple(recorded.shape)}, the model gives {tuple(computed.shape)}"
        return CheckResult(name, Verdict.FAILED, note=note)
    difference = (computed.cpu().float() - recorded.float()).abs()
    difference /= (recorded.abs().max().item() or 1.0) if relative else 1.0
    largest = difference.max().item()  # NaN if any difference is, and NaN fails
    verdict = Verdict.OK if largest <= tolerance else Verdict.FAILED
    return CheckResult(name, verdict, largest, difference.double().mean().item())


def _compare_ids(name: str, pairs: dict[str, tuple[list[int], list[int]]]) -> CheckResult:
    """Compare pairs of recorded and computed token ids."""
    for label, (recorded, computed) in pairs.items():
        for i, (expected, found) in enumerate(zip_longest(recorded, computed)):
            if found != expected:
                note = f"{label} has {found} instead of {expected} at token {i}"
                return CheckResult(name, Verdict.FAILED, note=note)
    return CheckResult(name, Verdict.OK if pairs else Verdict.NOT_RECORDED)


@dataclass
class _Checks:
    """The checks of one model against one reference."""

    model: FlorenceVLForConditionalGeneration
    processor: FlorenceVLProcessor
    reference: Reference
    tolerances: Tolerances

    def run(self) -> Iterator[CheckResult]:
        self.config: FlorenceVLConfig = self.model.config
        self.pixels = self.reference.load("pixel_values")
        yield (image_tokens := self.image_tokens())
        yield self.pixel_values()
        features, shape = {}, (3, self.config.image_size, self.config.image_size)
        # Why nothing that depends on the images can be compared.
        self.obstacle = "the numbers of image tokens differ" if image_tokens.verdict is Verdict.FAILED else ""
        if self.pixels is not None and self.pixels.shape[1:] == shape:
            features = self.encode_images(self.pixels)
        else:
            self.obstacle = f"needs pixel_values of shape {shape} per image, which are not recorded"
        yield from self.features(features)
        yield from self.forwards()
        yield self.generations()
        yield self.token_ids()

    def image_tokens(self) -> CheckResult:
        tensor = self.reference.tensors.get("image_feature") or self.reference.tensors.get("projected")
        if tensor is None or tensor.shape[1] == self.config.num_feature_tokens:
            return CheckResult("image tokens", Verdict.NOT_RECORDED if tensor is None else Verdict.OK)
        num_positions = self.config.feature_grid_size**2
        note = (
            f"{self.config.num_feature_tokens} per image instead of {tensor.shape[1]}; convert it again: "
            f"--image-feature-source temporal_avg_pool gives {num_positions}, spatial_avg_pool,temporal_avg_pool "
            f"{num_positions + 1}"
        )
        return CheckResult("image tokens", Verdict.FAILED, note=note)

    def pixel_values(self) -> CheckResult:
        paths, preprocess = self.reference.images, self.processor.image_processor
        if self.pixels is None or not paths or not all(path.is_file() for path in paths):
            return CheckResult("pixel values", Verdict.NOT_RECORDED)
        computed = torch.cat([preprocess(Image.open(path), return_tensors="pt").pixel_values for path in paths])
        result = _compare("pixel values", self.pixels, computed, self.tolerances.pixel_values)
        if result.max_difference is None:
            return result
        share = ((computed - self.pixels).abs() > 1e-6).double().mean().item()
        verdict = result.verdict if share <= self.tolerances.unequal_pixel_values else Verdict.FAILED
        return replace(result, verdict=verdict, note=f"{share:.2%} of the values differ" if share else "")

    def encode_images(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        batches = []
        for pixels in tqdm(pixel_values.split(IMAGES_PER_BATCH), desc="Images", leave=False):
            pixels = pixels.to(self.model.device, self.model.dtype)
            output = self.model.get_image_features(pixels, output_hidden_states=True, return_dict=True)
            features = {"davit": output.hidden_states[-1].flatten(2).transpose(1, 2), **output.features}
            features["projected"] = torch.stack(list(output.pooler_output))
            batches.append({name: feature.cpu() for name, feature in features.items()})
        return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}

    def features(self, computed: dict[str, torch.Tensor]) -> Iterator[CheckResult]:
        """Compare DaViT's feature map, V, V't of each prompt and the projection."""
        load, tolerances, prompts = self.reference.load, self.tolerances, self.config.fusion_prompts
        davit = computed.get("davit", self.obstacle)  # does not depend on the number of image tokens
        yield _compare("DaViT (relative)", load("davit"), davit, tolerances.davit, relative=True)
        image_feature = self.obstacle or computed.get(IMAGE_FEATURE, "the model does not fuse it")
        yield _compare("V", load("image_feature"), image_feature, tolerances.features)
        encoded = load("encoder_last_hidden_state")
        for i, prompt in enumerate(prompts):
            recorded = None if encoded is None else encoded.tensor_split(len(prompts), dim=-1)[i]
            yield _compare(f"V't{i + 1} ({prompt})", recorded, self.obstacle or computed[prompt], tolerances.features)
        yield _compare("projection", load("projected"), self.obstacle or computed["projected"], tolerances.features)

    def forwards(self) -> Iterator[CheckResult]:
        """Compare the logits of every forward pass at all positions that are not padding, and its loss."""
        forwards, tensors = self.reference.record["forwards"], self.reference.tensors
        num_forwards = max(len(forwards), sum(name.endswith(".logits") for name in tensors), 1)
        for i in tqdm(range(num_forwards), desc="Forwards", leave=False):
            forward = forwards[i] if i < len(forwards) else {}
            logits = self.reference.load(f"forward{i}.logits") if forward else None
            loss = torch.tensor(forward["loss"]) if {"loss", "labels"} <= forward.keys() else None
            has_images = any(IMAGE_TOKEN_INDEX in ids for ids in forward.get("input_ids", []))
            obstacle = self.obstacle if has_images else ""
            output: dict[str, Any] = {"logits": obstacle, "loss": obstacle}
            if not obstacle and (logits is not None or loss is not None):
                inputs = self.inputs(forward)
                output = dict(self.model(**inputs))
                if logits is not None:
                    # The original has no entries for `<image>`, and computes nothing meaningful at padding.
                    output["logits"] = output["logits"][..., ::LOGITS_STRIDE][..., : logits.shape[-1]].cpu()
                    if output["logits"].shape == logits.shape:
                        is_token = inputs["attention_mask"].cpu().bool()
                        output["logits"], logits = output["logits"][is_token], logits[is_token]
            yield _compare(f"logits {i}", logits, output["logits"], self.tolerances.logits)
            yield _compare(f"loss {i}", loss, output.get("loss", ""), self.tolerances.loss)

    def generations(self) -> CheckResult:
        """Compare the tokens of greedy decoding, as many as were recorded."""
        generations, pairs = self.reference.record["generations"], {}
        if generations and self.obstacle:
            return CheckResult("greedy tokens", Verdict.NOT_COMPARABLE, note=self.obstacle)
        for i, generation in enumerate(tqdm(generations, desc="Generations", leave=False)):
            recorded = generation["generated_ids"]
            inputs = self.inputs({"rows": [generation], "input_ids": [generation["chat_input_ids"]]})
            output_ids = self.model.generate(**inputs, max_new_tokens=len(recorded), do_sample=False, num_beams=1)
            computed = output_ids[0, inputs["input_ids"].shape[1] :].tolist()
            pairs[f"answer {i}, {generation['image']}"] = (recorded, computed)
        return _compare_ids("greedy tokens", pairs)

    def token_ids(self) -> CheckResult:
        """Compare the token ids of dialogs with those of the processor's chat template."""
        dialogs, pairs = self.reference.record["dialogs"], {}
        if dialogs and not self.processor.chat_template:
            return CheckResult("token ids", Verdict.NOT_COMPARABLE, note="the processor has no chat template")
        for i, dialog in enumerate(dialogs):
            messages = [_message(turn) for turn in dialog["conversations"]]
            prompt = messages[:-1] if messages[-1]["role"] == "assistant" else messages
            for key, conversation in (("train_input_ids", messages), ("chat_input_ids", prompt)):
                if key in dialog:
                    recorded, _ = forward_inputs({"rows": [{"image": ""}], "input_ids": [dialog[key]]}, self.config)
                    computed = self.processor.apply_chat_template(
                        conversation, tokenize=True, return_dict=True, add_generation_prompt=key == "chat_input_ids"
                    )
                    pairs[f"{key} of dialog {i}"] = (recorded["input_ids"][0].tolist(), computed["input_ids"][0])
        return _compare_ids("token ids", pairs)

    def inputs(self, forward: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return the model's inputs of a recorded forward pass, with the recorded pixel values of its images."""
        inputs, names = forward_inputs(forward, self.config)
        recorded = [path.name for path in self.reference.images]
        if unknown := set(names) - set(recorded):
            raise CheckpointError(f"The reference names the image {min(unknown)}, which its `images` lack.")
        if names and self.pixels is not None:
            inputs["pixel_values"] = self.pixels[[recorded.index(name) for name in names]].to(self.model.dtype)
        return {name: tensor.to(self.model.device) for name, tensor in inputs.items()}


def _message(turn: dict[str, str]) -> dict[str, Any]:
    """Return a recorded turn as a message with blank images: the token ids of an image do not depend on it."""
    images = [{"type": "image", "image": Image.new("RGB", (8, 8))}] * turn["value"].count(IMAGE_TOKEN)
    text = {"type": "text", "text": turn["value"].replace(IMAGE_TOKEN, "")}
    return {"role": LLAVA_ROLES.get(turn["from"], turn["from"]), "content": [*images, text]}


__all__ = ["CheckResult", "Tolerances", "Verdict", "agrees", "format_results", "verify"]
