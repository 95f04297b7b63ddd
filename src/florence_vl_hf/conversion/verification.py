# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Comparison of a model with activations that were recorded from the original, stage by stage."""

from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from ..modeling import FlorenceVLConfig, FlorenceVLForConditionalGeneration
from ..modeling.configuration_florence_vl import IMAGE_FEATURE
from ..processing import FlorenceVLProcessor
from .errors import CheckpointError
from .original_processor import IMAGE_TOKEN
from .stored_tensors import StoredTensor, list_file, read_json


# What stands for one image in recorded token ids.
IMAGE_MARK = -200
# Of the recorded logits, every fifth entry of the vocabulary is there.
LOGITS_STRIDE = 5
# Where the recorded pictures are, beside the reference.
IMAGES_FOLDER = "images"
# The recorded tensors that have a row per picture.
IMAGE_TENSORS = ("pixel_values", "davit", "image_feature", "encoder_last_hidden_state", "projected")
# The stage whose differences are shares of its largest recorded value: DaViT's are up to about 100.
DAVIT = "DaViT (relative)"
# What an entry of these lists of the record must hold.
RECORD_KEYS = {
    "dialogs": ("conversations",),
    "forwards": ("rows", "input_ids"),
    "generations": ("image", "chat_input_ids", "generated_ids"),
}
ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
# A few at a time: DaViT's first feature maps of one 768 x 768 image take hundreds of megabytes.
IMAGES_PER_BATCH = 2


@dataclass(frozen=True)
class Tolerances:
    """How far two computations in float32 may differ at most. All differences are absolute unless said otherwise."""

    pixel_values: float = 1e-6
    unequal_pixel_values: float = 1e-3  # share of the pixel values that may differ by more, but not by more than …
    pixel_steps: float = 1.0  # … so many steps of 8-bit colour
    davit: float = 2e-5  # relative
    features: float = 1e-4
    projection: float = 1e-4
    logits: float = 2e-3
    loss: float = 1e-3

    def times(self, factor: float) -> "Tolerances":
        return Tolerances(**{field.name: factor * getattr(self, field.name) for field in fields(self)})


class Verdict(StrEnum):
    OK = "ok"
    FAILED = "FAILED"
    NOT_RECORDED = "not recorded"
    NOT_COMPARABLE = "not comparable"


@dataclass(frozen=True)
class StageResult:
    """How one stage of the model compares with the recording: differences are `None` where there is no number."""

    stage: str
    verdict: Verdict
    max_difference: float | None = None
    mean_difference: float | None = None
    note: str = ""


def verify(
    model: FlorenceVLForConditionalGeneration,
    processor: FlorenceVLProcessor,
    reference: str | Path,
    tolerance_factor: float = 1.0,
) -> list[StageResult]:
    """
    Compare a model, from the recorded pixel values on, with what the original computed.

    Args:
        model (`FlorenceVLForConditionalGeneration`): Best in float32, as recordings are. It is set to evaluation.
        processor (`FlorenceVLProcessor`): Its processor.
        reference (`str` or `Path`): The recorded tensors, as `tools/record_reference.py` writes them. What was asked
            stands in a JSON file of the same name beside it, the pictures in the folder `images`.
        tolerance_factor (`float`, *optional*, defaults to 1.0): Multiplies every one of `Tolerances`.

    Returns:
        `list[StageResult]`: In the order of the computation.

    Raises:
        CheckpointError: If the reference cannot be read, or holds nothing that can be compared.
    """
    if model.config.model_type != FlorenceVLConfig.model_type:
        raise CheckpointError(
            f"Got a model of type {model.config.model_type!r}, expected {FlorenceVLConfig.model_type!r}; convert the "
            f"original with `florence-vl convert` first."
        )
    comparison = _Comparison(
        model.eval(), processor, _Reference.read(Path(reference)), Tolerances().times(tolerance_factor)
    )
    # TensorFloat-32, the default of convolutions on a GPU, is a thousand times coarser than what is compared here.
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        results = comparison.run()
    # A number of image tokens that is right proves nothing by itself.
    compared = [result for result in results[1:] if result.verdict in (Verdict.OK, Verdict.FAILED)]
    if agrees(results) and not compared:
        raise CheckpointError(
            f"{reference} records nothing that can be compared; expected tensors such as pixel_values, image_feature "
            f"and projected. Record it with tools/record_reference.py."
        )
    return results


def agrees(results: list[StageResult]) -> bool:
    """Whether no stage differs."""
    return all(result.verdict is not Verdict.FAILED for result in results)


def format_results(results: list[StageResult]) -> str:
    """The results as a table, and a last line that sums them up."""

    def number(difference: float | None) -> str:
        return "-" if difference is None else f"{difference:.2e}"

    rows = [("stage", "max difference", "mean difference", "verdict")]
    for result in results:
        verdict = f"{result.verdict}: {result.note}" if result.note else str(result.verdict)
        rows.append((result.stage, number(result.max_difference), number(result.mean_difference), verdict))
    width = max(len(row[0]) for row in rows)
    lines = [f"{row[0]:<{width}}  {row[1]:>14}  {row[2]:>15}  {row[3]}" for row in rows]

    count = {verdict: sum(result.verdict is verdict for result in results) for verdict in Verdict}
    num_compared = count[Verdict.OK] + count[Verdict.FAILED]
    if agrees(results):
        summary = f"All {num_compared} stages agree"
    else:
        summary = f"{count[Verdict.FAILED]} of {num_compared} stages differ"
    for verdict in (Verdict.NOT_RECORDED, Verdict.NOT_COMPARABLE):
        if count[verdict]:
            summary += f", {count[verdict]} {verdict}"
    return "\n".join([*lines, summary + "."])


def forward_inputs(forward: dict[str, Any], config: FlorenceVLConfig) -> tuple[dict[str, torch.Tensor], list[str]]:
    """
    A recorded forward of the original, with image tokens where it had one mark.

    Args:
        forward (`dict`): One of the record's `forwards`: rows of `input_ids`, and perhaps `attention_mask`, `labels`.
        config (`FlorenceVLConfig`): Of the model that is to run it.

    Returns:
        `tuple[dict[str, torch.Tensor], list[str]]`: Right-padded inputs of the model, without pixel values, and the
        names of the pictures whose pixel values they need.
    """
    rows, names = [], []
    for i, (row, ids) in enumerate(zip(forward["rows"], forward["input_ids"], strict=True)):
        mask = forward["attention_mask"][i] if "attention_mask" in forward else [1] * len(ids)
        labels = forward["labels"][i] if "labels" in forward else [-100] * len(ids)
        image = [(config.image_token_id, 1, -100)] * config.num_image_tokens
        spread = []
        for token in zip(ids, mask, labels, strict=True):
            spread += image if token[0] == IMAGE_MARK else [token]
        rows.append(spread)
        names += [row["image"]] * ids.count(IMAGE_MARK)
    length = max(map(len, rows))
    padded = torch.tensor([row + [(0, 0, -100)] * (length - len(row)) for row in rows])
    inputs = dict(zip(["input_ids", "attention_mask", "labels"], padded.unbind(-1), strict=True))
    if "labels" not in forward:
        del inputs["labels"]
    return inputs, names


def conversation_messages(conversations: list[dict[str, str]]) -> list[dict[str, Any]]:
    """The turns of a recorded dialog as messages, with a blank picture for each mark: its tokens are the same."""
    messages = []
    for turn in conversations:
        images = [{"type": "image", "image": Image.new("RGB", (8, 8))}] * turn["value"].count(IMAGE_TOKEN)
        text = [{"type": "text", "text": turn["value"].replace(IMAGE_TOKEN, "")}]
        messages.append({"role": ROLES.get(turn["from"], turn["from"]), "content": images + text})
    return messages


@dataclass(frozen=True)
class _Reference:
    """What was recorded: tensors, and what was asked of the original, if that was kept."""

    tensors: dict[str, StoredTensor]
    record: dict[str, Any]
    folder: Path

    @classmethod
    def read(cls, path: Path) -> "_Reference":
        if not path.is_file():
            raise CheckpointError(f"There is no reference {path}; record one with tools/record_reference.py.")
        tensors, record_file = list_file(path), path.with_suffix(".json")
        record = read_json(record_file) if record_file.is_file() else {}
        for name, keys in RECORD_KEYS.items():
            entries = record.get(name, [])
            if not isinstance(entries, list) or not all(isinstance(e, dict) and set(keys) <= set(e) for e in entries):
                raise CheckpointError(
                    f"`{name}` of {record_file} is not a list of entries that have {', '.join(keys)}; record it again."
                )
        images = record.get("images", [])
        if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
            raise CheckpointError(f"`images` of {record_file} is not a list of file names; record it again.")
        if outside := [name for name in images if name in ("", ".", "..") or "/" in name or "\\" in name]:
            raise CheckpointError(f"{record_file} names the picture {outside[0]!r}, which is no file name; refused.")
        num_images = {name: tensors[name].shape[0] for name in IMAGE_TENSORS if name in tensors}
        if images:
            num_images["images"] = len(images)
        if len(set(num_images.values())) > 1:
            raise CheckpointError(
                f"{path.name} and {record_file.name} disagree about the number of pictures ({num_images}); they do "
                f"not belong together. Record them again."
            )
        return cls(tensors, record, path.parent)

    def entries(self, name: str) -> list[dict[str, Any]]:
        return self.record.get(name, [])

    @property
    def images(self) -> list[str]:
        return self.record.get("images", [])

    def read_tensor(self, name: str) -> torch.Tensor | None:
        return self.tensors[name].read() if name in self.tensors else None


class _Difference:
    """The difference between two tensors, of which a piece comes at a time."""

    def __init__(self, unit: float = 1.0) -> None:
        self.unit = unit
        self.max = torch.tensor(0.0)
        self.sum = 0.0
        self.count = 0
        self.misshapen = ""

    def add(self, ours: torch.Tensor, recorded: torch.Tensor) -> torch.Tensor:
        """Returns the difference, element by element: of none if the two have not one shape."""
        if ours.shape != recorded.shape:
            self.misshapen = (
                self.misshapen or f"recorded as {tuple(recorded.shape)}, the model gives {tuple(ours.shape)}"
            )
            return torch.zeros(0)
        difference = (ours.float().cpu() - recorded.float()).abs() / self.unit
        if difference.numel():
            self.max = torch.maximum(self.max, difference.max())  # keeps NaN, which fails
        self.sum += difference.sum(dtype=torch.float64).item()
        self.count += difference.numel()
        return difference

    def result(self, stage: str, tolerance: float) -> StageResult:
        return self.judged(stage, self.max.item() <= tolerance)

    def judged(self, stage: str, sound: bool, complaint: str = "") -> StageResult:
        if self.misshapen:
            return StageResult(stage, Verdict.FAILED, note=self.misshapen)
        if self.count == 0:
            return StageResult(stage, Verdict.NOT_COMPARABLE, note="what is recorded is empty")
        mean = self.sum / self.count
        if sound:
            return StageResult(stage, Verdict.OK, self.max.item(), mean)
        return StageResult(stage, Verdict.FAILED, self.max.item(), mean, complaint)


class _Comparison:
    """One model against one reference. Each method compares a stage, or several that come from one computation."""

    def __init__(
        self,
        model: FlorenceVLForConditionalGeneration,
        processor: FlorenceVLProcessor,
        reference: _Reference,
        tolerances: Tolerances,
    ) -> None:
        self.model = model
        self.config: FlorenceVLConfig = model.config
        self.processor = processor
        self.reference = reference
        self.tolerances = tolerances
        self.pixel_shape = model.model.vision_tower.image_shape
        self.same_num_image_tokens = True

    def run(self) -> list[StageResult]:
        image_tokens = self.image_tokens()
        self.same_num_image_tokens = image_tokens.verdict is not Verdict.FAILED
        return [
            image_tokens,
            self.pixel_values(),
            *self.features(),
            *self.forwards(),
            self.generations(),
            self.dialogs(),
        ]

    def image_tokens(self) -> StageResult:
        stage, tensors, ours = "image tokens", self.reference.tensors, self.config.num_image_tokens
        if "image_feature" in tensors:
            recorded, ours = tensors["image_feature"].shape[1], self.config.num_feature_tokens
        elif "projected" in tensors:
            recorded = tensors["projected"].shape[1]
        elif (recorded := self.reference.record.get("num_image_tokens")) is None:
            return StageResult(stage, Verdict.NOT_RECORDED)
        if recorded == ours:
            return StageResult(stage, Verdict.OK, note=f"{ours} per image")
        num_positions = self.config.feature_grid_size**2
        sources = {num_positions + 1: "spatial_avg_pool,temporal_avg_pool", num_positions: "temporal_avg_pool"}
        remedy = f"no --image-feature-source gives that at {self.config.image_size} x {self.config.image_size} pixels"
        if recorded in sources:
            remedy = f"convert it again with --image-feature-source {sources[recorded]}"
        note = f"the original has {recorded} per image, the model {ours}; {remedy}"
        return StageResult(stage, Verdict.FAILED, note=note)

    def pixel_values(self) -> StageResult:
        stage, recorded = "pixel values", self.reference.read_tensor("pixel_values")
        paths = [self.reference.folder / IMAGES_FOLDER / name for name in self.reference.images]
        if recorded is None:
            return StageResult(stage, Verdict.NOT_RECORDED)
        if not paths or not all(path.is_file() for path in paths):
            return StageResult(stage, Verdict.NOT_RECORDED, note=f"needs the pictures, in {IMAGES_FOLDER}/ beside it")
        step = 1 / 255 / torch.tensor(self.processor.image_processor.image_std)[:, None, None]
        difference, num_unequal, max_steps = _Difference(), 0, 0.0
        for batch in _batches(len(paths)):
            images = [Image.open(path) for path in paths[batch]]
            ours = self.processor.image_processor(images, return_tensors="pt").pixel_values
            by_value = difference.add(ours, recorded[batch])
            if by_value.numel():
                num_unequal += int((by_value > self.tolerances.pixel_values).sum())
                max_steps = max(max_steps, (by_value / step).max().item())
        share = num_unequal / max(difference.count, 1)
        # A whole step is seldom exactly 1 in float32.
        sound = share <= self.tolerances.unequal_pixel_values and max_steps <= self.tolerances.pixel_steps + 1e-3
        return difference.judged(stage, sound, f"{share:.2%} differ, by up to {max_steps:.1f} steps of 8-bit colour")

    def features(self) -> list[StageResult]:
        """DaViT's feature map, V, V't of each prompt, and the projection."""
        prompts = [f"V't{i} ({name})" for i, name in enumerate(self.config.fusion_prompts, start=1)]
        recorded = {DAVIT: self.reference.read_tensor("davit"), "V": self.reference.read_tensor("image_feature")}
        recorded |= dict.fromkeys(prompts)
        if prompts and "encoder_last_hidden_state" in self.reference.tensors:
            of_prompts = self.reference.read_tensor("encoder_last_hidden_state").tensor_split(len(prompts), dim=-1)
            recorded |= dict(zip(prompts, of_prompts, strict=True))
        recorded["projection"] = self.reference.read_tensor("projected")
        tolerances = dict.fromkeys(recorded, self.tolerances.features)
        tolerances |= {DAVIT: self.tolerances.davit, "projection": self.tolerances.projection}

        results, differences = {}, {}
        for stage, tensor in recorded.items():
            if tensor is None:
                results[stage] = StageResult(stage, Verdict.NOT_RECORDED)
            elif obstacle := self._obstacle(up_to_davit=stage == DAVIT):
                results[stage] = StageResult(stage, Verdict.NOT_COMPARABLE, note=obstacle)
            elif stage == "V" and IMAGE_FEATURE not in self.config.fusion_features:
                results[stage] = StageResult(stage, Verdict.NOT_COMPARABLE, note="the model does not fuse it")
            else:
                differences[stage] = _Difference((tensor.abs().max().item() or 1.0) if stage == DAVIT else 1.0)

        if differences:
            pixel_values = self.reference.read_tensor("pixel_values")
            for batch in tqdm(_batches(len(pixel_values)), desc="Pictures", leave=False):
                seen = self.model.get_image_features(
                    self._to_model(pixel_values[batch]), output_hidden_states=DAVIT in differences, return_dict=True
                )
                ours = dict(zip(prompts, (seen.features[name] for name in self.config.fusion_prompts), strict=True))
                ours |= {"V": seen.features.get(IMAGE_FEATURE), "projection": torch.stack(list(seen.pooler_output))}
                if seen.hidden_states is not None:
                    ours[DAVIT] = seen.hidden_states[-1].flatten(2).transpose(1, 2)
                for stage, difference in differences.items():
                    difference.add(ours[stage], recorded[stage][batch])
        results |= {stage: difference.result(stage, tolerances[stage]) for stage, difference in differences.items()}
        return [results[stage] for stage in recorded]

    def forwards(self) -> list[StageResult]:
        """Logits of every forward, at every position that is not padding, then the losses."""
        forwards, tensors = self.reference.entries("forwards"), self.reference.tensors
        num_forwards = max(len(forwards), sum(name.endswith(".logits") for name in tensors), 1)
        logits = [StageResult(f"logits {i}", Verdict.NOT_RECORDED) for i in range(num_forwards)]
        losses = [StageResult(f"loss {i}", Verdict.NOT_RECORDED) for i in range(num_forwards)]
        for i, forward in enumerate(tqdm(forwards, desc="Forwards", leave=False)):
            has_logits, has_loss = f"forward{i}.logits" in tensors, {"loss", "labels"} <= set(forward)
            if not has_logits and not has_loss:
                continue
            inputs, images = forward_inputs(forward, self.config)
            if obstacle := self._obstacle(images):
                if has_logits:
                    logits[i] = StageResult(f"logits {i}", Verdict.NOT_COMPARABLE, note=obstacle)
                if has_loss:
                    losses[i] = StageResult(f"loss {i}", Verdict.NOT_COMPARABLE, note=obstacle)
                continue
            output = self.model(**self._with_pixels(inputs, images))
            if has_logits:
                recorded, difference = self.reference.read_tensor(f"forward{i}.logits"), _Difference()
                # The original has no rows for `<image>`, nor a meaning for what is padding.
                ours = output.logits[..., ::LOGITS_STRIDE][..., : recorded.shape[-1]].cpu()
                padding = inputs["attention_mask"][..., None] == 0
                if ours.shape == recorded.shape:
                    ours, recorded = ours.masked_fill(padding, 0), recorded.masked_fill(padding, 0)
                difference.add(ours, recorded)
                logits[i] = difference.result(f"logits {i}", self.tolerances.logits)
            if has_loss:
                difference = _Difference()
                difference.add(output.loss.reshape(1), torch.tensor([forward["loss"]]))
                losses[i] = difference.result(f"loss {i}", self.tolerances.loss)
        return [*logits, *losses]

    def generations(self) -> StageResult:
        """The tokens that greedy decoding gives, as many as were recorded."""
        stage, generations = "greedy tokens", self.reference.entries("generations")
        if not generations:
            return StageResult(stage, Verdict.NOT_RECORDED)
        complaints = []
        for generation in tqdm(generations, desc="Answers", leave=False):
            inputs, images = forward_inputs(
                {"rows": [generation], "input_ids": [generation["chat_input_ids"]]}, self.config
            )
            if obstacle := self._obstacle(images):
                return StageResult(stage, Verdict.NOT_COMPARABLE, note=obstacle)
            recorded = generation["generated_ids"]
            output_ids = self.model.generate(
                **self._with_pixels(inputs, images), max_new_tokens=max(len(recorded), 1), do_sample=False, num_beams=1
            )
            ours = output_ids[0, inputs["input_ids"].shape[1] :].tolist()
            if ours != recorded:
                complaints.append(f"{generation['image']} gives {ours} instead of {recorded}")
        return _equality(stage, len(generations), complaints)

    def dialogs(self) -> StageResult:
        """The token ids that the processor's chat template gives."""
        stage, num_compared, complaints = "token ids", 0, []
        for i, dialog in enumerate(self.reference.entries("dialogs")):
            messages = conversation_messages(dialog["conversations"])
            asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
            for name, conversation in (("train_input_ids", messages), ("chat_input_ids", asked)):
                if name not in dialog:
                    continue
                if not self.processor.chat_template:
                    return StageResult(stage, Verdict.NOT_COMPARABLE, note="the processor has no chat template")
                ours = self.processor.apply_chat_template(
                    conversation, tokenize=True, return_dict=True, add_generation_prompt=name == "chat_input_ids"
                )["input_ids"][0]
                recorded, _ = forward_inputs({"rows": [{"image": ""}], "input_ids": [dialog[name]]}, self.config)
                num_compared += 1
                if ours != recorded["input_ids"][0].tolist():
                    complaints.append(f"{name} of dialog {i} differ")
        if not num_compared:
            return StageResult(stage, Verdict.NOT_RECORDED)
        return _equality(stage, num_compared, complaints)

    def _obstacle(self, images: list[str] | None = None, up_to_davit: bool = False) -> str:
        """
        Why the model cannot look at the recorded pictures, or not compare what it sees: empty if it can.

        Args:
            images (`list[str]`, *optional*): Only these are looked at. There may be none. By default, all.
            up_to_davit (`bool`, *optional*, defaults to `False`): What is compared does not depend on image tokens.
        """
        if images == []:
            return ""
        if "pixel_values" not in self.reference.tensors:
            return "needs pixel_values, which are not recorded"
        recorded = self.reference.tensors["pixel_values"].shape[1:]
        if recorded != self.pixel_shape:
            return f"pixel_values are recorded as {recorded}, the model takes {self.pixel_shape}"
        if unknown := sorted(set(images or []) - set(self.reference.images)):
            return f"needs pixel_values of {unknown[0]}, which are not recorded"
        return "" if up_to_davit or self.same_num_image_tokens else "the numbers of image tokens differ"

    def _with_pixels(self, inputs: dict[str, torch.Tensor], images: list[str]) -> dict[str, torch.Tensor]:
        inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        if images:
            rows = [self.reference.images.index(name) for name in images]
            inputs["pixel_values"] = self._to_model(self.reference.read_tensor("pixel_values")[rows])
        return inputs

    def _to_model(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return pixel_values.to(self.model.device, self.model.dtype)


def _batches(num_images: int) -> list[slice]:
    return [slice(start, start + IMAGES_PER_BATCH) for start in range(0, num_images, IMAGES_PER_BATCH)]


def _equality(stage: str, num_compared: int, complaints: list[str]) -> StageResult:
    """The result of a stage that is equal or not: its complaints, of which the first is told."""
    if not complaints:
        return StageResult(stage, Verdict.OK, note=f"{num_compared} compared")
    return StageResult(
        stage, Verdict.FAILED, note=f"{len(complaints)} of {num_compared} differ, first: {complaints[0]}"
    )


__all__ = [
    "StageResult",
    "Tolerances",
    "Verdict",
    "agrees",
    "conversation_messages",
    "format_results",
    "forward_inputs",
    "verify",
]
