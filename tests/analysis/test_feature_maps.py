# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from torch.testing import assert_close

from florence_vl_hf.analysis import feature_maps
from florence_vl_hf.analysis.feature_maps import (
    PrincipalComponents,
    background_threshold,
    compress_similarities,
    scale_components,
)

from ..conftest import tiny_config


SOURCES = [("spatial_avg_pool", "temporal_avg_pool"), ("temporal_avg_pool", "spatial_avg_pool"), ("last_frame",)]


def features_of(grid: torch.Tensor, config) -> torch.Tensor:
    """Return features with a grid `(height, width, hidden_size)`, and an average token that is far from it."""
    average, positions = torch.full((1, grid.shape[-1]), 1e3), grid.flatten(0, 1)
    tokens = [average if source == "spatial_avg_pool" else positions for source in config.image_feature_source]
    return torch.cat(tokens)[None]


class TestFeatureMaps:
    @pytest.mark.parametrize("sources", SOURCES)
    def test_positions_keep_their_place_and_the_average_is_left_out(self, sources):
        config = tiny_config(image_feature_source=sources, image_size=96)
        grid = torch.zeros(3, 3, 16)
        grid[0, 2, 5], grid[2, 1, 7] = 10, 5
        maps = feature_maps({"image": features_of(grid, config)}, config)
        flat = maps["image"].round(decimals=3).flatten(0, 1).tolist()
        different = [i for i, color in enumerate(flat) if flat.count(color) == 1]
        assert maps["image"].shape == (3, 3, 3) and different == [2, 7]

    def test_all_maps_of_an_image_have_one_basis(self):
        config = tiny_config(image_size=96)
        generator = torch.Generator().manual_seed(0)
        one, other = (features_of(torch.randn(3, 3, 16, generator=generator), config) for _ in range(2))
        maps = feature_maps({"image": one, "ocr": 100 * other + 5}, config)
        # Neither the mean of a feature nor its scale changes its colours.
        again = feature_maps({"image": 0.01 * one - 3, "ocr": other}, config)
        assert_close(maps, again, rtol=0, atol=1e-4)
        alone = feature_maps({"image": one}, config)["image"]
        assert (maps["image"] - alone).abs().max() > 0.1

    def test_no_maps_without_positions(self):
        config = tiny_config(image_feature_source=["spatial_avg_pool"])
        assert feature_maps({"image": torch.zeros(1, 1, 16)}, config) == {}


class TestPrincipalComponents:
    def test_equal_an_svd_of_all_positions_at_once(self):
        generator = torch.Generator().manual_seed(0)
        mixing = torch.randn(2, 12, 12, generator=generator)
        images = [
            {
                "image": torch.randn(4, 4, 12, generator=generator) @ mixing[0] + 7,
                "ocr": torch.randn(4, 4, 12, generator=generator) @ mixing[1] * 0.01,
            }
            for _ in range(5)
        ]
        components = PrincipalComponents(iter(images))
        found = [components.transform(maps) for maps in images]

        positions = {name: torch.stack([maps[name] for maps in images]).flatten(0, 2) for name in images[0]}
        centred = {name: value - value.mean(dim=0) for name, value in positions.items()}
        scaled = {name: value / value.square().sum(dim=1).mean().sqrt() for name, value in centred.items()}
        _, values, directions = torch.linalg.svd(torch.cat(list(scaled.values())), full_matrices=False)
        for name, value in scaled.items():
            expected = value @ directions[:3].T
            actual = torch.stack([maps[name] for maps in found]).flatten(0, 2)
            signs = (expected * actual).sum(dim=0).sign()
            assert_close(actual, expected * signs, rtol=1e-3, atol=1e-4)
        assert_close(components.explained_variance, float(values[:3].square().sum() / values.square().sum()))

    def test_low_values_of_the_first_component_are_background(self):
        for sign in (1, -1):
            maps = {"image": torch.randn(6, 6, 8, generator=torch.Generator().manual_seed(1)) * 0.1}
            maps["image"][2:4, 2:5, 3] += sign * 5
            [scaled] = scale_components([PrincipalComponents([maps]).transform(maps)])
            is_foreground = scaled["image"][..., 0] > background_threshold([scaled])
            assert is_foreground.nonzero().tolist() == [[y, x] for y in (2, 3) for x in (2, 3, 4)]


class TestSimilarities:
    @pytest.mark.parametrize("num_components", [64, 4])
    def test_error_is_that_of_the_worst_pair(self, num_components):
        feature_map = torch.randn(5, 5, 40, generator=torch.Generator().manual_seed(0)) + 0.5
        compressed = compress_similarities(feature_map, num_components)
        restored = compressed.vectors.float() * compressed.scales
        flat = feature_map.flatten(0, 1)
        exact = torch.nn.functional.cosine_similarity(flat[:, None], flat[None], dim=-1)
        assert compressed.vectors.dtype == torch.int8
        assert_close(compressed.error, float((restored @ restored.T - exact).abs().max()), rtol=1e-3, atol=1e-6)
        # No worse than the best approximation of that rank, but for the 8 bits.
        variances, directions = torch.linalg.eigh(exact)
        kept = directions[:, -num_components:] * variances[-num_components:]
        best = (kept @ directions[:, -num_components:].T - exact).abs().max()
        assert best <= compressed.error < best + 0.02
