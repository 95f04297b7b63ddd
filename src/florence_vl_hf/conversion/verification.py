# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Compare a model with a recorded reference of the original, check by check."""

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
from .reference import RECORD_SCRIPT, Reference, forward_inputs, read_reference


# Of recorded logits, every fifth entry of the vocabulary is kept.
LOGITS_STRIDE = 5
# Relative to the largest recorded value, which is about 100.
DAVIT = "DaViT (relative)"
# DaViT's first feature maps of one 768 x 768 image take hundreds of megabytes.
IMAGES_PER_BATCH = 2


@dataclass(frozen=True)
class Tolerances:
    """Largest accepted differences between two float32 computations, absolute unless stated otherwise."""

    pixel_values: float = 1e-6
    unequal_pixel_values: float = 1e-3  # share of the pixel values that may differ by more than `pixel_values`
    pixel_steps: float = 1.0  # largest difference of any pixel value, in steps of 8-bit colour
    davit: float = 2e-5  # relative
    features: float = 1e-4
    projection: float = 1e-4
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

    Returns:
        `list[CheckResult]`: In the order of computation.

    Raises:
        CheckpointError: If the reference cannot be read, or contains nothing to compare.
    """
    if model.config.model_type != FlorenceVLConfig.model_type:
        raise CheckpointError(
            f"Got a model of type {model.config.model_type!r}, expected {FlorenceVLConfig.model_type!r}; load the "
            f"checkpoint with `load_pretrained`."
        )
    tolerances = Tolerances(**{name: tolerance_factor * value for name, value in asdict(Tolerances()).items()})
    checks = _Checks(model.eval(), processor, read_reference(Path(reference)), tolerances)
    # TensorFloat-32, the default of convolutions on a GPU, is a thousand times coarser than the tolerances.
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        results = checks.run()
    # An equal number of image tokens proves nothing.
    if all(result.verdict in (Verdict.NOT_RECORDED, Verdict.NOT_COMPARABLE) for result in results[1:]) and agrees(
        results
    ):
        raise CheckpointError(
            f"{reference} contains nothing to compare; expected tensors such as pixel_values, image_feature and "
            f"projected. Record it with `python {RECORD_SCRIPT}`."
        )
    return results


def agrees(results: list[CheckResult]) -> bool:
    """Return whether no check failed."""
    return all(result.verdict is not Verdict.FAILED for result in results)


def format_results(results: list[CheckResult]) -> str:
    """Format results as a table with a summary in its last line."""
    rows = [("check", "max difference", "mean difference", "verdict")]
    for result in results:
        numbers = ["-" if n is None else f"{n:.2e}" for n in (result.max_difference, result.mean_difference)]
        rows.append((result.name, *numbers, ": ".join(filter(None, (result.verdict, result.note)))))
    width = max(len(row[0]) for row in rows)
    lines = [f"{row[0]:<{width}}  {row[1]:>14}  {row[2]:>15}  {row[3]}" for row in rows]
    count = {verdict: sum(result.verdict is verdict for result in results) for verdict in Verdict}
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
    if not recorded.numel():
        return CheckResult(name, Verdict.NOT_COMPARABLE, note="the recorded tensor is empty")
    if computed.shape != recorded.shape:
        note = f"recorded as {tuple(recorded.shape)}, the model gives {tuple(computed.shape)}"
        return CheckResult(name, Verdict.FAILED, note=note)
    difference = (computed.cpu().float() - recorded.float()).abs()
    if relative:
        difference /= recorded.abs().max().item() or 1.0
    largest = difference.max().item()  # NaN if any difference is, and NaN fails
    verdict = Verdict.OK if largest <= tolerance else Verdict.FAILED
    return CheckResult(name, verdict, largest, difference.double().mean().item())


def _compare_ids(name: str, pairs: dict[str, tuple[list[int], list[int]]]) -> CheckResult:
    """Compare pairs of recorded and computed token ids."""
    if not pairs:
        return CheckResult(name, Verdict.NOT_RECORDED)
    differing = [label for label, (recorded, computed) in pairs.items() if computed != recorded]
    if differing:
        recorded, computed = pairs[differing[0]]
        start = next(i for i, (a, b) in enumerate(zip_longest(recorded, computed)) if a != b)
        found, expected = computed[start : start + 5], recorded[start : start + 5]
        note = f"{differing[0]} has {found} instead of {expected} at token {start}"
        return CheckResult(name, Verdict.FAILED, note=f"{len(differing)} of {len(pairs)} differ, first: {note}")
    return CheckResult(name, Verdict.OK, note=f"{len(pairs)} compared")


@dataclass
class _Checks:
    """The checks of one model against one reference, each in a method of its own."""

    model: FlorenceVLForConditionalGeneration
    processor: FlorenceVLProcessor
    reference: Reference
    tolerances: Tolerances

    def run(self) -> list[CheckResult]:
        self.config: FlorenceVLConfig = self.model.config
        self.images = self.reference.entries("images")
        self.pixels = self.reference.load("pixel_values")
        # Why the model cannot encode the recorded images, and why the result cannot be compared.
        self.image_obstacle = self.feature_obstacle = ""
        image_shape = (3, self.config.image_size, self.config.image_size)
        if self.pixels is None:
            self.image_obstacle = "needs pixel_values, which are not recorded"
        elif (recorded := tuple(self.pixels.shape[1:])) != image_shape:
            self.image_obstacle = f"pixel_values are recorded as {recorded}, the model expects {image_shape}"
        image_tokens = self.image_tokens()
        mismatch = "the numbers of image tokens differ" if image_tokens.verdict is Verdict.FAILED else ""
        self.feature_obstacle = self.image_obstacle or mismatch
        results = [image_tokens, self.pixel_values(), *self.features(), *self.forwards()]
        return [*results, self.generations(), self.token_ids()]

    def image_tokens(self) -> CheckResult:
        config, tensors, computed = self.config, self.reference.tensors, self.config.num_image_tokens
        if "image_feature" in tensors:
            recorded, computed = tensors["image_feature"].shape[1], config.num_feature_tokens
        elif "projected" in tensors:
            recorded = tensors["projected"].shape[1]
        elif (recorded := self.reference.record.get("num_image_tokens")) is None:
            return CheckResult("image tokens", Verdict.NOT_RECORDED)
        if recorded == computed:
            return CheckResult("image tokens", Verdict.OK, note=f"{computed} per image")
        num_positions = config.feature_grid_size**2
        sources = {num_positions + 1: "spatial_avg_pool,temporal_avg_pool", num_positions: "temporal_avg_pool"}
        remedy = f"no --image-feature-source gives that at {config.image_size} x {config.image_size} pixels"
        if recorded in sources:
            remedy = f"convert it again with --image-feature-source {sources[recorded]}"
        note = f"the original has {recorded} per image, the model {computed}; {remedy}"
        return CheckResult("image tokens", Verdict.FAILED, note=note)

    def pixel_values(self) -> CheckResult:
        paths = [self.reference.image_directory / name for name in self.images]
        if self.pixels is None or not paths or not all(path.is_file() for path in paths):
            note = "" if self.pixels is None else "needs the images, in images/ beside the reference"
            return CheckResult("pixel values", Verdict.NOT_RECORDED, note=note)
        image_processor, tolerances = self.processor.image_processor, self.tolerances
        computed = torch.cat([image_processor(Image.open(path), return_tensors="pt").pixel_values for path in paths])
        result = _compare("pixel values", self.pixels, computed, tolerances.pixel_values)
        if result.verdict is not Verdict.FAILED or result.max_difference is None:
            return result
        # Other versions of the image libraries may round a few pixels to the next step.
        difference = (computed - self.pixels).abs()
        share = (difference > tolerances.pixel_values).double().mean().item()
        steps = (difference * 255 * torch.tensor(image_processor.image_std)[:, None, None]).max().item()
        # One step is seldom exactly 1 in float32.
        if share <= tolerances.unequal_pixel_values and steps <= tolerances.pixel_steps + 1e-3:
            return replace(result, verdict=Verdict.OK)
        return replace(result, note=f"{share:.2%} differ, by up to {steps:.1f} steps of 8-bit colour")

    def features(self) -> list[CheckResult]:
        """Compare DaViT's feature map, V, V't of each prompt and the projection."""
        load, encoded = self.reference.load, self.reference.load("encoder_last_hidden_state")
        prompts = [f"V't{i} ({name})" for i, name in enumerate(self.config.fusion_prompts, start=1)]
        recorded = {DAVIT: load("davit"), "V": load("image_feature"), **dict.fromkeys(prompts)}
        if prompts and encoded is not None:
            recorded |= zip(prompts, encoded.tensor_split(len(prompts), dim=-1), strict=True)
        recorded["projection"] = load("projected")
        computed: dict[str, torch.Tensor | str] = {"V": "the model does not fuse it"}
        if self.pixels is not None and not self.image_obstacle:
            computed |= self._encode_images(self.pixels, prompts)
        tolerances = dict.fromkeys(recorded, self.tolerances.features)
        tolerances |= {DAVIT: self.tolerances.davit, "projection": self.tolerances.projection}
        obstacles = dict.fromkeys(recorded, self.feature_obstacle) | {DAVIT: self.image_obstacle}
        return [
            _compare(name, tensor, obstacles[name] or computed[name], tolerances[name], relative=name == DAVIT)
            for name, tensor in recorded.items()
        ]

    def _encode_images(self, pixel_values: torch.Tensor, prompts: list[str]) -> dict[str, torch.Tensor]:
        batches = []
        for pixels in tqdm(pixel_values.split(IMAGES_PER_BATCH), desc="Images", leave=False):
            output = self.model.get_image_features(
                pixels.to(self.model.device, self.model.dtype), output_hidden_states=True, return_dict=True
            )
            names = {IMAGE_FEATURE: "V"} | dict(zip(self.config.fusion_prompts, prompts, strict=True))
            features = {names[name]: feature for name, feature in output.features.items()}
            features[DAVIT] = output.hidden_states[-1].flatten(2).transpose(1, 2)
            features["projection"] = torch.stack(list(output.pooler_output))
            batches.append({name: feature.cpu() for name, feature in features.items()})
        return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}

    def forwards(self) -> list[CheckResult]:
        """Compare the logits of every forward pass at all positions that are not padding, then the losses."""
        forwards, tensors = self.reference.entries("forwards"), self.reference.tensors
        num_forwards = max(len(forwards), sum(name.endswith(".logits") for name in tensors), 1)
        names = [f"{kind} {i}" for kind in ("logits", "loss") for i in range(num_forwards)]
        results = {name: CheckResult(name, Verdict.NOT_RECORDED) for name in names}
        for i, forward in enumerate(tqdm(forwards, desc="Forwards", leave=False)):
            logits = self.reference.load(f"forward{i}.logits")
            loss = torch.tensor(forward["loss"]) if {"loss", "labels"} <= forward.keys() else None
            if logits is None and loss is None:
                continue
            inputs = self._model_inputs(forward)
            if isinstance(inputs, str):
                computed_logits = computed_loss = inputs
            else:
                output = self.model(**inputs)
                computed_logits, computed_loss = output.logits[..., ::LOGITS_STRIDE].cpu(), output.loss
                if logits is not None:
                    # The original has no entries for `<image>`, and computes nothing meaningful at padding.
                    computed_logits = computed_logits[..., : logits.shape[-1]]
                    if computed_logits.shape == logits.shape:
                        is_token = inputs["attention_mask"].cpu().bool()
                        computed_logits, logits = computed_logits[is_token], logits[is_token]
            results[f"logits {i}"] = _compare(f"logits {i}", logits, computed_logits, self.tolerances.logits)
            results[f"loss {i}"] = _compare(f"loss {i}", loss, computed_loss, self.tolerances.loss)
        return list(results.values())

    def generations(self) -> CheckResult:
        """Compare the tokens of greedy decoding, as many as were recorded."""
        pairs = {}
        for generation in tqdm(self.reference.entries("generations"), desc="Generations", leave=False):
            ids, recorded = generation["chat_input_ids"], generation["generated_ids"]
            inputs = self._model_inputs({"rows": [generation], "input_ids": [ids]})
            if isinstance(inputs, str):
                return CheckResult("greedy tokens", Verdict.NOT_COMPARABLE, note=inputs)
            output_ids = self.model.generate(
                **inputs, max_new_tokens=max(len(recorded), 1), do_sample=False, num_beams=1
            )
            computed = output_ids[0, inputs["input_ids"].shape[1] :].tolist()
            pairs[f"answer {len(pairs)}, {generation['image']}"] = (recorded, computed)
        return _compare_ids("greedy tokens", pairs)

    def token_ids(self) -> CheckResult:
        """Compare the token ids of dialogs with those of the processor's chat template."""
        pairs = {}
        for i, dialog in enumerate(self.reference.entries("dialogs")):
            messages = [_message(turn) for turn in dialog["conversations"]]
            prompt = messages[:-1] if messages[-1]["role"] == "assistant" else messages
            for key, conversation in (("train_input_ids", messages), ("chat_input_ids", prompt)):
                if key not in dialog:
                    continue
                if not self.processor.chat_template:
                    return CheckResult("token ids", Verdict.NOT_COMPARABLE, note="the processor has no chat template")
                recorded, _ = forward_inputs({"rows": [{"image": ""}], "input_ids": [dialog[key]]}, self.config)
                computed = self.processor.apply_chat_template(
                    conversation, tokenize=True, return_dict=True, add_generation_prompt=key == "chat_input_ids"
                )
                pairs[f"{key} of dialog {i}"] = (recorded["input_ids"][0].tolist(), computed["input_ids"][0])
        return _compare_ids("token ids", pairs)

    def _model_inputs(self, forward: dict[str, Any]) -> dict[str, Any] | str:
        """Return the inputs of a recorded forward pass, or why the model cannot run it."""
        inputs, images = forward_inputs(forward, self.config)
        unknown = sorted(set(images) - set(self.images))
        if images and (self.feature_obstacle or unknown):
            return self.feature_obstacle or f"needs pixel_values of {unknown[0]}, which are not recorded"
        if images and self.pixels is not None:
            pixels = self.pixels[[self.images.index(name) for name in images]]
            inputs["pixel_values"] = pixels.to(self.model.dtype)
        return {name: tensor.to(self.model.device) for name, tensor in inputs.items()}


def _message(turn: dict[str, str]) -> dict[str, Any]:
    """Return a recorded turn as a message with blank images: the token ids of an image do not depend on it."""
    images = [{"type": "image", "image": Image.new("RGB", (8, 8))}] * turn["value"].count(IMAGE_TOKEN)
    text = {"type": "text", "text": turn["value"].replace(IMAGE_TOKEN, "")}
    return {"role": LLAVA_ROLES.get(turn["from"], turn["from"]), "content": [*images, text]}


__all__ = ["CheckResult", "Tolerances", "Verdict", "agrees", "format_results", "verify"]
