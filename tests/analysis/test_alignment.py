# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""The measures against straightforward computations, and `align` on tiny models."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import CLIPImageProcessorPil, CLIPVisionModel

from florence_vl_hf.analysis import align, alignment, fit_linear_map, linear_cka, mutual_knn
from florence_vl_hf.conversion import load_pretrained

from ..evaluation.conftest import directory
from .test_encoders import encoders, write_pairs


__all__ = ["directory", "encoders"]

SUBSETS = [
    *("image", "caption", "grounding", "ocr"),
    *("image+caption", "image+grounding", "image+ocr", "caption+grounding", "caption+ocr", "grounding+ocr"),
    *("image+caption+grounding", "image+caption+ocr", "image+grounding+ocr", "caption+grounding+ocr"),
    "image+caption+grounding+ocr",
]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotation(size: int) -> torch.Tensor:
    return torch.linalg.qr(normal(size, size, seed=9)).Q


class TestMutualKNN:
    @pytest.mark.parametrize(("n", "k"), [(11, 10), (30, 3), (50, 10)])
    def test_equals_lists_of_neighbors(self, n, k, monkeypatch):
        monkeypatch.setattr(alignment, "ROWS_PER_CHUNK", 7)
        x, y = normal(n, 6), normal(n, 4, seed=1)
        y[:, :3] += 2 * x[:, :3]

        def neighbors(samples: np.ndarray, i: int) -> set[int]:
            cosines = [
                -2.0 if i == j else samples[i] @ other / np.linalg.norm(samples[i]) / np.linalg.norm(other)
                for j, other in enumerate(samples)
            ]
            return set(sorted(range(n), key=lambda j: -cosines[j])[:k])

        shared = [len(neighbors(x.numpy(), i) & neighbors(y.numpy(), i)) / k for i in range(n)]
        assert mutual_knn(x, y, k) == pytest.approx(sum(shared) / n)

    def test_limits(self):
        x = normal(400, 20)
        assert mutual_knn(x, x) == mutual_knn(x, 3 * x @ rotation(20)) == mutual_knn(x, x, k=1) == 1
        assert mutual_knn(x, normal(400, 20, seed=1)) == pytest.approx(10 / 399, abs=0.01)

    def test_too_few_samples(self):
        with pytest.raises(ValueError, match="Got 10 and 10 samples, expected the same number of both, more than 10"):
            mutual_knn(normal(10, 3), normal(10, 3))


class TestLinearCKA:
    @pytest.mark.parametrize("n", [5, 40])
    def test_equals_centred_kernels(self, n):
        x, y = normal(n, 12).double().numpy(), normal(n, 7, seed=1).double().numpy() + 3
        y[:, :3] += x[:, :3]
        centre = np.eye(n) - 1 / n
        kernels = [centre @ samples @ samples.T @ centre for samples in (x, y)]
        hsic = [[np.trace(a @ b) for b in kernels] for a in kernels]
        expected = hsic[0][1] / np.sqrt(hsic[0][0] * hsic[1][1])
        assert linear_cka(torch.tensor(x), torch.tensor(y)) == pytest.approx(expected, rel=1e-9)

    def test_limits(self):
        x = normal(300, 20)
        assert linear_cka(x, 3 * x @ rotation(20) + 7) == pytest.approx(1, rel=1e-5)
        assert linear_cka(x, x * torch.logspace(0, 2, 20)) < 0.9  # not of any other linear map
        assert linear_cka(x, normal(300, 20, seed=1)) < 0.1
        assert linear_cka(x, torch.ones(300, 4)) == 0


class TestLinearMap:
    def test_equals_adam_with_written_out_gradients(self):
        x, y, held_out = normal(24, 5) * torch.logspace(-3, 3, 5), normal(24, 4, seed=1) + 1, torch.arange(24) % 4 == 0
        train_losses, held_out_losses = fit_linear_map(x, y, held_out, num_steps=30, learning_rate=0.2)
        a, t = x.double().numpy(), y.double().numpy()
        train = ~held_out.numpy()
        a = (a - a[train].mean(0)) / a[train].std(0, ddof=1)
        t /= np.linalg.norm(t, axis=1, keepdims=True)
        bias, weights = t[train].mean(0) * 4**0.5, np.zeros((5, 4))
        m = v = 0.0
        for step in range(31):
            out = a @ weights + bias
            norms = np.linalg.norm(out, axis=1, keepdims=True)
            cosines = (out * t).sum(1, keepdims=True) / norms
            assert train_losses[step] == pytest.approx(1 - cosines[train].mean(), abs=2e-5)
            assert_close(held_out_losses[step], torch.tensor(1 - cosines[~train, 0]).float(), atol=2e-5, rtol=0)
            # The derivative of -cosine with respect to the output, averaged over the training part.
            gradient = a[train].T @ ((cosines * out / norms - t) / norms)[train] / train.sum()
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            corrected = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
            weights -= 0.2 / 5 * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)

    def test_starts_as_the_best_constant(self):
        y, held_out = normal(50, 6) + 1, torch.arange(50) < 10
        start = fit_linear_map(normal(50, 3, seed=2), y, held_out, num_steps=1)[0][0]
        constants = torch.nn.functional.normalize(torch.cat([normal(2000, 6, seed=3) + 1, normal(2000, 6, seed=4)]))
        cosines = constants @ torch.nn.functional.normalize(y[10:]).T
        assert 0 < 1 - cosines.mean(1).max() - start < 0.02

    def test_only_the_feature_that_determines_the_targets_aligns(self):
        related, unrelated = normal(300, 16), normal(300, 16, seed=1)
        targets = 100 * (related @ normal(16, 32, seed=2) + 2)
        held_out = torch.arange(300) % 5 == 0
        curves = {
            name: fit_linear_map(features, targets, held_out)[1].mean(1)
            for name, features in [
                ("related", related),
                ("scaled", 1e4 * related + 5),
                ("both", torch.cat([unrelated, related], dim=1)),
                ("unrelated", unrelated),
            ]
        }
        constant = curves["related"][0]
        assert constant > 0.2 and curves["related"].min() < 0.01 and curves["both"].min() < 0.01
        assert curves["unrelated"].min() > 0.9 * constant and curves["unrelated"][-1] > constant
        assert_close(curves["scaled"], curves["related"], atol=1e-3, rtol=0)

    def test_constant_channel_changes_nothing_else(self):
        x, y, held_out = normal(40, 6), normal(40, 5, seed=1), torch.arange(40) < 8
        x[:, 2] = 3.0
        losses = fit_linear_map(x, y, held_out)[1]
        x[:8, 2] = 1e6
        assert losses.isfinite().all() and fit_linear_map(x, y, held_out)[1].isfinite().all()


class TestAlign:
    @pytest.fixture(scope="class", autouse=True)
    @staticmethod
    def _few_steps():
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(alignment, "fit_linear_map", partial(fit_linear_map, num_steps=20))
            yield

    @pytest.fixture(scope="class")
    @staticmethod
    def made(_few_steps, directory, encoders, tmp_path_factory):
        """Pairs of which three images are broken, and the result of `align` with its cache."""
        folder = tmp_path_factory.mktemp("align")
        pairs = write_pairs(folder, 30)
        (folder / "3.png").write_bytes(b"no image")
        (folder / "9.png").unlink()
        Image.new("RGB", (12_001, 1)).save(folder / "28.png")
        kwargs = {"encoders": list(encoders.values()), "device": "cpu"}
        return pairs, kwargs, folder, align(pairs, directory, folder / "cache", **kwargs)

    def test_every_set_of_features(self, made, encoders):
        result = made[-1]
        assert [r["features"] for r in result["results"]] == [*SUBSETS, *map(str, encoders.values())]
        width = result["results"][0]["num_channels"]
        for r in result["results"][:15]:
            assert r["num_channels"] == width * len(r["features"].split("+"))
        for r in result["results"]:
            assert r["curve"][0] == result["constant"] and r["loss"] == min(r["curve"]) == r["curve"][r["best_step"]]
            assert len(r["curve"]) == len(r["train_curve"]) == 21 and r["train_curve"][-1] < r["train_curve"][0]
        assert result["settings"]["num_pairs"] == result["settings"]["num_images"] == 27

    def test_broken_images_are_listed_and_change_nothing(self, made, directory, tmp_path):
        pairs, kwargs, folder, result = made
        errors = {error["image"]: error["error"] for error in result["errors"]}
        assert list(errors) == [str(folder / name) for name in ("3.png", "9.png", "28.png")]
        assert all(image in error for image, error in errors.items())
        kept = [pair for pair in pairs if pair["image"] not in errors]
        without = align(kept, directory, tmp_path / "cache", **kwargs)
        assert without["errors"] == []
        for r, expected in zip(without["results"], result["results"], strict=True):
            assert r["loss"] == pytest.approx(expected["loss"], abs=1e-4)

    def test_same_numbers_with_and_without_a_cache(self, made, directory, tmp_path):
        pairs, kwargs, folder, result = made
        again = align(pairs, directory, tmp_path / "cache", **kwargs)
        cached = align(pairs, directory, folder / "cache", **kwargs)
        assert json.dumps(again) == json.dumps(cached) == json.dumps(result)
        assert json.dumps(align(pairs, directory, folder / "cache", **kwargs, seed=1)) != json.dumps(result)

    def test_inputs_of_the_linear_maps(self, made, directory, encoders, monkeypatch):
        """Against forwards of single images and captions."""
        pairs, kwargs, folder, result = made
        given = []
        fit = alignment.fit_linear_map
        monkeypatch.setattr(alignment, "fit_linear_map", lambda *args: given.append(args) or fit(*args))
        align(pairs, directory, folder / "cache", **kwargs)
        by_name = {r["features"]: args[0] for r, args in zip(result["results"], given, strict=True)}
        model, processor = load_pretrained(directory, dtype=torch.float32)
        clip = CLIPVisionModel.from_pretrained(encoders["clip"])
        broken = [error["image"] for error in result["errors"]]
        kept = [pair for pair in pairs if pair["image"] not in broken]
        for row in (0, 7, 26):
            image = Image.open(kept[row]["image"]).convert("RGB")
            pixels = processor.image_processor([image], return_tensors="pt")["pixel_values"]
            with torch.no_grad():
                features = model.get_image_features(pixels).features
                token_ids = processor.tokenizer(kept[row]["caption"], return_tensors="pt").input_ids
                states = model.model.language_model(token_ids).last_hidden_state[0, 1:]  # without <s>
                pixels = CLIPImageProcessorPil.from_pretrained(encoders["clip"])(
                    image, return_tensors="pt"
                ).pixel_values
                clip_tokens = clip(pixels).last_hidden_state
            assert token_ids[0, 0] == processor.tokenizer.bos_token_id
            assert_close(given[0][1][row], states.mean(0), atol=1e-5, rtol=1e-4)
            for name in ("image", "ocr"):
                assert_close(by_name[name][row], features[name][0].mean(0), atol=1e-4, rtol=1e-3)
            assert_close(
                by_name["image+caption"][row],
                torch.cat([features["image"][0].mean(0), features["caption"][0].mean(0)]),
                atol=1e-4,
                rtol=1e-3,
            )
            assert_close(by_name[str(encoders["clip"])][row], clip_tokens[0].mean(0), atol=1e-5, rtol=1e-4)

    def test_captions_of_one_image_are_not_split(self, directory, tmp_path, monkeypatch):
        pairs = write_pairs(tmp_path, 20)
        (tmp_path / "same.png").write_bytes((tmp_path / "7.png").read_bytes())
        more = [{"image": pair["image"], "caption": f"{pair['caption']} again"} for pair in pairs]
        pairs += [*more, {"image": str(tmp_path / "same.png"), "caption": "the same"}]
        given = []
        monkeypatch.setattr(alignment, "mutual_knn", lambda x, y: given.append((x, y)) or 0.0)
        fit = alignment.fit_linear_map
        monkeypatch.setattr(alignment, "fit_linear_map", lambda *args: given.append(args) or fit(*args))
        result = align(pairs, directory, tmp_path / "cache", device="cpu")
        features, targets, held_out = given[0]
        assert held_out[:20].tolist() == held_out[20:40].tolist() and held_out[40] == held_out[7]
        assert held_out[:20].sum() == 4 and result["settings"]["num_images"] == 20
        assert (features[:20] == features[20:40]).all() and not (targets[:20] == targets[20:40]).all(1).any()
        assert len(given[1][0]) == len(given[1][1]) == 20
