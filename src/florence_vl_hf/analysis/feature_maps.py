# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Colour maps of the features of an image, V and V't of each prompt."""

import torch

from ..modeling import FlorenceVLConfig


def feature_maps(features: dict[str, torch.Tensor], config: FlorenceVLConfig) -> dict[str, torch.Tensor]:
    """
    Map the first three principal components of an image's features to red, green and blue.

    All maps have one basis. Each map is centred before, because the means of V and of V't differ more than positions
    do, and each component of it is scaled to 0..1.

    Args:
        features (`dict[str, torch.Tensor]`, each of shape `(1, num_feature_tokens, hidden_size)`):
            Features of one image, as `get_image_features(...).features`.
        config (`FlorenceVLConfig`): Configuration of the model.

    Returns:
        `dict[str, torch.Tensor]`, each of shape `(feature_grid_size, feature_grid_size, 3)`: a map in float32 on the
        CPU under each name of `features`. Empty if the only `image_feature_source` is `spatial_avg_pool`, a mean
        over all positions.
    """
    size, start = config.feature_grid_size, 0
    for source in config.image_feature_source:
        if source != "spatial_avg_pool":
            break
        start += 1
    else:
        return {}
    positions = torch.cat(list(features.values()))[:, start : start + size**2].float()
    positions = positions - positions.mean(dim=1, keepdim=True)  # (num_features, num_positions, hidden_size)
    basis = torch.linalg.svd(positions.flatten(0, 1), full_matrices=False).Vh[:3]  # (3, hidden_size)
    components = positions @ basis.T  # (num_features, num_positions, 3)
    lowest, highest = components.amin(dim=1, keepdim=True), components.amax(dim=1, keepdim=True)
    # A component that is the same everywhere becomes 0.
    components = (components - lowest) / (highest - lowest).clamp(min=torch.finfo(torch.float32).tiny)
    return dict(zip(features, components.unflatten(1, (size, size)).cpu(), strict=True))
