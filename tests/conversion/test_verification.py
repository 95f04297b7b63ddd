# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from florence_vl_hf import FlorenceVLForConditionalGeneration, FlorenceVLProcessor
from florence_vl_hf.conversion import CheckpointError, convert
from florence_vl_hf.conversion.verification import CheckResult, Tolerances, Verdict, agrees, format_results, verify

from ..conftest import FIXTURES, Golden, status


LLAMA = Golden(FIXTURES / "llama-small")
REFERENCE = LLAMA.folder / "reference.safetensors"
SAMPLES = [
    (f"logits {i} ({row['image']})", row["image"], -200 in ids)
    for i, forward in enumerate(LLAMA.reference["forwards"])
    for row, ids in zip(forward["rows"], forward["input_ids"], strict=True)
]
LOGITS_CHECKS = [name for name, _, _ in SAMPLES]
LOSS_CHECKS = [f"loss {i}" for i in range(len(LLAMA.reference["forwards"]))]
FEATURE_CHECKS = ["DaViT (relative)", "V", "V't1 (caption)", "V't2 (ocr)", "V't3 (grounding)", "projection"]
CHECKS = [
    "image tokens",
    "pixel values",
    *FEATURE_CHECKS,
    *LOGITS_CHECKS,
    *LOSS_CHECKS,
    "greedy tokens",
    "token ids",
]


@pytest.fixture(scope="module")
def converted_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("verified") / "llama"
    convert(LLAMA.checkpoint, output, LLAMA.vision_tower)
    return output


@pytest.fixture(scope="module")
def good_model(converted_llama: Path) -> FlorenceVLForConditionalGeneration:
    return AutoModelForImageTextToText.from_pretrained(converted_llama, dtype=torch.float32)


@pytest.fixture
def broken_model(good_model: FlorenceVLForConditionalGeneration) -> FlorenceVLForConditionalGeneration:
    """A copy to break."""
    return copy.deepcopy(good_model)


@pytest.fixture
def llama_processor(converted_llama: Path) -> FlorenceVLProcessor:
    return AutoProcessor.from_pretrained(converted_llama)


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    """A copy of the recorded reference to change, with its record and its images."""
    shutil.copytree(LLAMA.folder / "images", tmp_path / "images")
    shutil.copy(LLAMA.folder / "reference.json", tmp_path)
    return Path(shutil.copy(REFERENCE, tmp_path))


def change(reference: Path, tensors: dict[str, torch.Tensor | None] | None = None, **record: Any) -> Path:
    """Replace tensors and entries of the record; `None` removes them."""
    for stored, changes in ((load_file(reference), tensors or {}), (LLAMA.reference, record)):
        changed = {name: value for name, value in {**stored, **changes}.items() if value is not None}
        if changes is record:
            reference.with_suffix(".json").write_text(json.dumps(changed))
        else:
            save_file(changed, reference)
    return reference


def verdicts(results: list[CheckResult]) -> dict[str, Verdict]:
    return {result.name: result.verdict for result in results}


def failed(results: list[CheckResult]) -> list[str]:
    return [result.name for result in results if result.verdict is Verdict.FAILED]


class TestAgreement:
    def test_every_check_of_a_converted_checkpoint_passes(self, golden, model, processor):
        results = verify(model, processor, golden.folder / "reference.safetensors")
        assert verdicts(results) == dict.fromkeys(CHECKS, Verdict.OK)
        assert agrees(results)
        with_numbers = [result for result in results if result.max_difference is not None]
        assert len(with_numbers) == 1 + len(FEATURE_CHECKS) + len(LOGITS_CHECKS) + len(LOSS_CHECKS)
        assert all(result.mean_difference <= result.max_difference < 1e-3 for result in with_numbers)

    def test_command(self, converted_llama, capfd):
        assert status("verify", converted_llama, "--reference", REFERENCE, "--device", "cpu") == 0
        printed = capfd.readouterr()
        lines = printed.out.strip().split("\n")
        assert lines[0].split() == ["check", "max", "difference", "mean", "difference", "verdict"]
        assert lines[-1] == f"All {len(CHECKS)} checks passed."
        assert "Forwards" in printed.err

    def test_table_is_aligned(self):
        results = [
            CheckResult("V", Verdict.OK, 1.5e-5, 1e-6),
            CheckResult("V't3 (grounding)", Verdict.FAILED, 0.25, 0.125),
            CheckResult("token ids", Verdict.NOT_RECORDED),
            CheckResult("projection", Verdict.FAILED, note="why"),
        ]
        assert format_results(results).split("\n") == [
            "check             max difference  mean difference  verdict",
            "V                       1.50e-05         1.00e-06  ok",
            "V't3 (grounding)        2.50e-01         1.25e-01  FAILED",
            "token ids                      -                -  not recorded",
            "projection                     -                -  FAILED: why",
            "2 of 3 checks failed, 1 not recorded.",
        ]


class TestBrokenModels:
    """A fault fails its own check, and none before it."""

    @pytest.mark.parametrize(
        ("weight", "check"),
        [
            ("model.vision_tower.backbone.blocks.3.0.channel_block.ffn.fc2.weight", "DaViT (relative)"),
            ("model.vision_tower.backbone.convs.0.conv.weight", "DaViT (relative)"),
            ("model.vision_tower.image_projector.image_projection.weight", "V"),
            ("model.vision_tower.image_projector.image_position_embed.row_embeddings.weight", "V"),
            ("model.vision_tower.encoder.layers.1.fc1.weight", "V't1 (caption)"),
            ("model.multi_modal_projector.layers.1.weight", "projection"),
            ("model.language_model.layers.0.self_attn.v_proj.weight", LOGITS_CHECKS[0]),
            ("lm_head.weight", LOGITS_CHECKS[0]),
        ],
    )
    def test_one_weight(self, weight, check, broken_model, llama_processor):
        with torch.no_grad():
            broken_model.get_parameter(weight).view(-1)[0] += 1
        results = verify(broken_model, llama_processor, REFERENCE)
        assert failed(results)[0] == check
        assert not agrees(results)

    def test_one_prompt(self, broken_model, llama_processor):
        broken_model.model.vision_tower.prompts.input_ids[1, 3] += 1
        of_features = [name for name in failed(verify(broken_model, llama_processor, REFERENCE)) if "V" in name]
        assert of_features == ["V't2 (ocr)"]

    def test_image_settings(self, good_model, llama_processor):
        llama_processor.image_processor.do_pad = False
        results = verify(good_model, llama_processor, REFERENCE)
        assert failed(results) == ["pixel values"]
        assert results[1].max_difference > Tolerances.pixel_values

    @pytest.mark.parametrize(("share", "fails"), [(1e-4, []), (1e-2, ["pixel values"])])
    def test_rounded_pixel_values(self, share, fails, good_model, llama_processor, reference):
        """Image libraries may round a few values differently, by one step of 8-bit colour."""
        rounded = LLAMA.tensors["pixel_values"].clone().flatten()
        rounded[:: int(1 / share)] += 1 / 255 / 0.225
        change(reference, {"pixel_values": rounded.view_as(LLAMA.tensors["pixel_values"])})
        results = verify(good_model, llama_processor, reference)
        assert [name for name in failed(results) if name == "pixel values"] == fails

    def test_chat_template(self, good_model, llama_processor):
        llama_processor.chat_template = llama_processor.chat_template.replace("polite", "rude")
        results = verify(good_model, llama_processor, REFERENCE)
        assert failed(results) == ["token ids"]
        assert results[-1].note.startswith("train_input_ids of dialog 0 has ")

    def test_nan_weights(self, broken_model, llama_processor):
        with torch.no_grad():
            broken_model.get_parameter("model.multi_modal_projector.layers.2.bias")[0] = torch.nan
        assert failed(verify(broken_model, llama_processor, REFERENCE))[0] == "projection"

    def test_tolerance_factor(self, broken_model, llama_processor):
        with torch.no_grad():
            broken_model.get_parameter("lm_head.weight")[0, 0] += 0.01
        assert set(failed(verify(broken_model, llama_processor, REFERENCE))) == set(LOGITS_CHECKS)
        assert agrees(verify(broken_model, llama_processor, REFERENCE, tolerance_factor=100))
        # So strictly, no two computations in float32 agree.
        assert set(FEATURE_CHECKS) <= set(failed(verify(broken_model, llama_processor, REFERENCE, tolerance_factor=0)))

    def test_command_fails(self, broken_model, llama_processor, tmp_path, capfd):
        with torch.no_grad():
            broken_model.get_parameter("model.language_model.norm.weight")[0] += 1
        broken_model.save_pretrained(tmp_path)
        llama_processor.save_pretrained(tmp_path)
        assert status("verify", tmp_path, "--reference", REFERENCE, "--device", "cpu") == 1
        printed = capfd.readouterr()
        assert "florence-vl: error" not in printed.err
        table = printed.out.strip().split("\n")
        assert table[8].startswith("projection") and table[8].endswith("ok")
        assert table[9].startswith(LOGITS_CHECKS[0]) and table[9].endswith("FAILED")
        assert table[-1].endswith(f"of {len(CHECKS)} checks failed.")


class TestOtherModels:
    @pytest.mark.parametrize(("source", "num_image_tokens"), [("temporal_avg_pool", 9), ("spatial_avg_pool", 1)])
    def test_number_of_image_tokens_comes_first(self, source, num_image_tokens, tmp_path, capfd):
        """The small version of 576 or 577 tokens."""
        convert(LLAMA.checkpoint, tmp_path / "out", LLAMA.vision_tower, image_feature_source=[source])
        assert status("verify", tmp_path / "out", "--reference", REFERENCE, "--device", "cpu") == 1
        table = capfd.readouterr().out.strip().split("\n")
        assert table[1].startswith("image tokens ")
        assert (
            f"FAILED: {num_image_tokens} per image instead of 10; convert it again: --image-feature-source" in table[1]
        )
        assert table[1].endswith("temporal_avg_pool gives 9, spatial_avg_pool,temporal_avg_pool 10")
        text_checks = [name for name, _, has_image in SAMPLES if not has_image]
        good = ["pixel values", "DaViT (relative)", *text_checks, "token ids"]
        assert [line.split("  ")[0] for line in table if line.endswith("  ok")] == good
        assert f"FAILED: recorded as (7, 10, 8), the model gives (7, {num_image_tokens}, 8)" in table[4]
        assert table[-1] == f"{len(CHECKS) - len(good)} of {len(CHECKS)} checks failed."

    def test_images_of_another_size(self, good_model, llama_processor, reference):
        change(reference, {"pixel_values": LLAMA.tensors["pixel_values"][..., :64, :64].contiguous()})
        results = verify(good_model, llama_processor, reference)
        assert failed(results) == ["pixel values"]
        assert results[1].note == "recorded as (7, 3, 64, 64), the model gives (7, 3, 96, 96)"
        found = verdicts(results)
        assert found["V"] is found[LOGITS_CHECKS[0]] is found["greedy tokens"] is Verdict.NOT_RECORDED

    def test_token_ids_of_another_model(self, good_model, llama_processor):
        with pytest.raises(CheckpointError, match="token id .*, but the model has only 512 tokens"):
            verify(good_model, llama_processor, FIXTURES / "phi-small" / "reference.safetensors")

    def test_fewer_features(self, converted_llama, llama_processor):
        """A model without V and with two prompts, against a recording with three."""
        config = AutoModelForImageTextToText.from_pretrained(converted_llama).config
        config.fusion_features = ["caption", "ocr"]
        model = FlorenceVLForConditionalGeneration(config).float()
        found = verdicts(verify(model, llama_processor, REFERENCE))
        assert "V" not in found
        assert found["V't1 (caption)"] is found["V't2 (ocr)"] is found["projection"] is Verdict.FAILED

    def test_model_of_another_type(self, llama_processor, good_model):
        with pytest.raises(CheckpointError, match="type 'llama', expected 'florence_vl'"):
            verify(good_model.model.language_model, llama_processor, REFERENCE)


class TestReferences:
    def test_tensors_alone(self, good_model, llama_processor, reference):
        reference.with_suffix(".json").unlink()
        results = verify(good_model, llama_processor, reference)
        expected = dict.fromkeys(["pixel values", "greedy tokens", "token ids"], Verdict.NOT_RECORDED)
        expected |= dict.fromkeys(["image tokens", *FEATURE_CHECKS], Verdict.OK)
        assert verdicts(results) == expected
        assert format_results(results).endswith("All 7 checks passed, 3 not recorded.")

    @pytest.mark.parametrize(
        ("tensor", "checks"),
        [
            ("davit", ["DaViT (relative)"]),
            ("image_feature", ["V"]),
            ("encoder_last_hidden_state", FEATURE_CHECKS[2:5]),
            ("projected", ["projection"]),
            ("forward3.logits", [name for name in LOGITS_CHECKS if name.startswith("logits 3 ")] + ["loss 3"]),
        ],
    )
    def test_missing_tensor(self, tensor, checks, good_model, llama_processor, reference):
        found = verdicts(verify(good_model, llama_processor, change(reference, {tensor: None})))
        assert found == dict.fromkeys(CHECKS, Verdict.OK) | dict.fromkeys(checks, Verdict.NOT_RECORDED)

    def test_missing_record(self, good_model, llama_processor, reference):
        shutil.rmtree(reference.parent / "images")
        forwards = [{key: forward[key] for key in ("rows", "input_ids")} for forward in LLAMA.reference["forwards"]]
        change(reference, forwards=forwards[:1], generations=None, dialogs=None)
        found = verdicts(verify(good_model, llama_processor, reference))
        passed = [name for name, verdict in found.items() if verdict is Verdict.OK]
        assert passed == ["image tokens", *FEATURE_CHECKS, LOGITS_CHECKS[0]]
        assert set(found.values()) == {Verdict.OK, Verdict.NOT_RECORDED}

    def test_missing_pixel_values(self, good_model, llama_processor, reference):
        change(reference, {"pixel_values": None})
        found = verdicts(verify(good_model, llama_processor, reference))
        assert found["pixel values"] is Verdict.NOT_RECORDED
        assert found["V"] is found[LOGITS_CHECKS[0]] is found["greedy tokens"] is Verdict.NOT_RECORDED
        assert found["image tokens"] is found["token ids"] is Verdict.OK

    @pytest.mark.parametrize("tensor", ["davit", "image_feature", "encoder_last_hidden_state", "projected"])
    def test_features_of_fewer_images(self, tensor, good_model, llama_processor, reference):
        features = LLAMA.tensors[tensor][:3].clone()
        assert agrees(verify(good_model, llama_processor, change(reference, {tensor: features})))
        features[2] += 1
        assert failed(verify(good_model, llama_processor, change(reference, {tensor: features})))

    @pytest.mark.parametrize("num_images", [1, 3])
    def test_pixel_values_of_fewer_images(self, num_images, good_model, llama_processor, reference):
        change(reference, {"pixel_values": LLAMA.tensors["pixel_values"][:num_images]})
        found = verdicts(verify(good_model, llama_processor, reference))
        assert [found[name] for name in ("pixel values", *FEATURE_CHECKS, "greedy tokens")] == [Verdict.OK] * 8
        is_there = LLAMA.reference["images"][:num_images]
        for name, image, has_image in SAMPLES:
            assert found[name] is (Verdict.NOT_RECORDED if has_image and image not in is_there else Verdict.OK)

    def test_padding_is_ignored(self, good_model, llama_processor, reference):
        logits = LLAMA.tensors["forward4.logits"].clone()
        lengths = [sum(mask) for mask in LLAMA.reference["forwards"][4]["attention_mask"]]
        row = lengths.index(min(lengths))
        logits[row, -1] = torch.nan
        assert agrees(verify(good_model, llama_processor, change(reference, {"forward4.logits": logits})))
        logits[row, 0, 3] += 0.01
        assert failed(verify(good_model, llama_processor, change(reference, {"forward4.logits": logits}))) == [
            f"logits 4 ({LLAMA.reference['forwards'][4]['rows'][row]['image']})"
        ]

    def test_tensors_of_another_shape_fail(self, good_model, llama_processor, reference):
        change(reference, {"davit": torch.zeros(7, 4, 96), "forward0.logits": torch.zeros(1, 3, 97)})
        results = verify(good_model, llama_processor, reference)
        assert failed(results) == ["DaViT (relative)", LOGITS_CHECKS[0]]
        assert results[2].note == "recorded as (7, 4, 96), the model gives (7, 9, 96)"

    def test_other_tokens_fail(self, good_model, llama_processor, reference):
        generations = copy.deepcopy(LLAMA.reference["generations"])
        generations[1]["generated_ids"][-1] += 1
        results = verify(good_model, llama_processor, change(reference, generations=generations))
        assert failed(results) == ["greedy tokens"]
        last = generations[1]["generated_ids"][-1]
        assert results[-2].note.startswith("answer 1, ")
        assert results[-2].note.endswith(f"has {last - 1} instead of {last} at token 15")

    def test_another_loss_fails(self, good_model, llama_processor, reference):
        """Of a batch of several samples: its mean is over all labels, not over samples."""
        forwards = copy.deepcopy(LLAMA.reference["forwards"])
        batch = max(range(len(forwards)), key=lambda i: len(forwards[i]["rows"]))
        forwards[batch]["loss"] += 0.01
        assert failed(verify(good_model, llama_processor, change(reference, forwards=forwards))) == [f"loss {batch}"]

    @pytest.mark.parametrize("tensors", [{"something": torch.zeros(2)}, {"image_feature": torch.zeros(7, 10, 8)}])
    def test_nothing_to_compare(self, tensors, good_model, llama_processor, tmp_path):
        save_file(tensors, tmp_path / "reference.safetensors")
        with pytest.raises(CheckpointError, match="contains nothing to compare"):
            verify(good_model, llama_processor, tmp_path / "reference.safetensors")

    @pytest.mark.parametrize(
        ("record", "message"),
        [
            ({"images": ["../secret.png"] * 7}, "`images` of .* holds '../secret.png', expected the names of files"),
            ({"images": 7}, "'images' expected a list, got int"),
            ({"images": [7]}, "not a record of the original: Invalid item at index 0 in list 'images'"),
            ({"forwards": [{"input_ids": [[1]]}]}, "'forwards.rows' expected a list, got NoneType"),
            ({"forwards": [7]}, "Invalid item at index 0 in list 'forwards'"),
            (
                {"generations": [{"image": "alpha.png", "chat_input_ids": "a"}]},
                "'generations.chat_input_ids' expected",
            ),
            ({"dialogs": {"conversations": []}}, "'dialogs' expected a list, got dict"),
            ({"dialogs": [{"conversations": [{"from": "human"}]}]}, "Invalid item at index 1 in tuple 'dialogs.conv"),
            ({"forwards": [{"input_ids": [[1]], "rows": [{}]}]}, "'forwards.rows.image' expected str, got NoneType"),
        ],
    )
    def test_invalid_record_is_an_error(self, record, message, good_model, llama_processor, reference):
        with pytest.raises(CheckpointError, match=message):
            verify(good_model, llama_processor, change(reference, **record))

    @pytest.mark.parametrize("tensor", ["pixel_values", "davit", "image_feature", "projected", "forward0.logits"])
    def test_tensor_with_too_few_dimensions(self, tensor, good_model, llama_processor, reference):
        change(reference, {tensor: torch.zeros(7)})
        with pytest.raises(CheckpointError, match=rf"{tensor} in reference.safetensors has shape \(7,\), expected"):
            verify(good_model, llama_processor, reference)

    def test_empty_entries_are_not_compared(self, good_model, llama_processor, reference):
        generations = [{"image": "alpha.png", "chat_input_ids": [], "generated_ids": [1]}]
        generations += [{"image": "alpha.png", "chat_input_ids": [1], "generated_ids": []}]
        dialogs = [{"conversations": [], "chat_input_ids": [1]}, {"conversations": [{"from": "gpt", "value": "Hi"}]}]
        forwards = [{"rows": [{"image": "alpha.png"}], "input_ids": [[]]}]
        change(reference, generations=generations, dialogs=dialogs, forwards=forwards)
        found = verdicts(verify(good_model, llama_processor, reference))
        checks = ("greedy tokens", "token ids", "logits 0 (alpha.png)")
        assert [found[name] for name in checks] == [Verdict.NOT_RECORDED] * 3

    def test_missing_or_damaged_file_is_one_line(self, converted_llama, reference, capfd):
        reference.write_bytes(reference.read_bytes()[:-1000])
        for path, message in (("nowhere.safetensors", "There is no reference"), (reference, "damaged or incomplete")):
            assert status("verify", converted_llama, "--reference", path, "--device", "cpu") == 1
            error = capfd.readouterr().err.strip().split("\n")[-1]
            assert error.startswith("florence-vl: error: ") and message in error
