# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch

from florence_vl_hf.analysis import feature_maps

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
        large, small = (features_of(torch.randn(3, 3, 16, generator=generator), config) for _ in range(2))
        both = feature_maps({"image": 100 * large, "ocr": small}, config)
        alone = {name: feature_maps({name: value}, config)[name] for name, value in (("image", large), ("ocr", small))}
        # The basis is that of the larger features; its directions can be reversed.
        for name, is_same in (("image", True), ("ocr", False)):
            reversals = torch.stack([both[name] - alone[name], both[name] - (1 - alone[name])])
            assert (reversals.abs().amax(dim=(1, 2)).amin(dim=0).max() < 0.01) == is_same
            assert both[name].amin(dim=(0, 1)).tolist() == [0] * 3 and both[name].amax(dim=(0, 1)).tolist() == [1] * 3

    def test_no_maps_without_positions(self):
        config = tiny_config(image_feature_source=["spatial_avg_pool"])
        assert feature_maps({"image": torch.zeros(1, 1, 16)}, config) == {}
