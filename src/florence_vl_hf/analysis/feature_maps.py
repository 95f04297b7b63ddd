# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Maps of features: their first three principal components, over any number of images in bounded memory."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..modeling import FlorenceVLConfig
from .extraction import ImageFeatures, position_tokens


# The share of each component's values that a colour scale clips at either end.
CLIPPED = 0.01
# Smaller variances are those of a constant.
TINY = torch.finfo(torch.float32).tiny


class PrincipalComponents:
    """
    The first three principal components of feature maps, in one basis for all of them.

    V and V't of each prompt are standardized before: centred by their own mean over all positions and divided by the
    square root of their own total variance, because they differ more in both than positions do.

    Args:
        maps (iterable of `dict[str, torch.Tensor]`): Feature maps of each image by name, of shape
            `(height, width, hidden_size)`. Only sums over them are kept, in float64.
    """

    def __init__(self, maps: Iterable[dict[str, torch.Tensor]]) -> None:
        counts: dict[str, int] = defaultdict(int)
        sums: dict[str, Any] = defaultdict(float)
        products: dict[str, Any] = defaultdict(float)
        for of_image in maps:
            for name, feature_map in of_image.items():
                positions = feature_map.double().flatten(0, 1)
                counts[name] += len(positions)
                sums[name] += positions.sum(dim=0)
                products[name] += positions.T @ positions
        self.means: dict[str, torch.Tensor] = {name: sums[name] / count for name, count in counts.items()}
        covariances = {name: products[name] / counts[name] - mean.outer(mean) for name, mean in self.means.items()}
        self.scales = {name: own.trace().clamp(min=TINY).sqrt() for name, own in covariances.items()}
        total = torch.stack([own / self.scales[name] ** 2 for name, own in covariances.items()]).sum(dim=0)
        directions, variances, _ = torch.linalg.svd(total)
        # The sign of a direction is arbitrary: its largest entry is positive.
        signs = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True)).sign()
        self.basis = (directions * signs)[:, :3]  # (hidden_size, 3)
        self.explained_variance = float(variances[:3].sum() / variances.sum().clamp(min=TINY))

    def transform(self, maps: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the components of an image's maps by name, of shape `(height, width, 3)` in float32."""
        return {
            name: ((feature_map.double() - self.means[name]) / self.scales[name] @ self.basis).float()
            for name, feature_map in maps.items()
        }


def scale_components(components: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """
    Scale each component to 0..1, the same for all maps of all images, with its extreme values clipped.

    The first component is reversed if it is larger at the border of the maps than on average, so that low values tend
    to be background.
    """
    stacked = torch.stack([part for maps in components for part in maps.values()])  # (num_maps, height, width, 3)
    is_border = torch.ones(stacked.shape[1:3], dtype=torch.bool)
    is_border[1:-1, 1:-1] = False
    direction = torch.ones(3)
    if stacked[:, is_border, 0].mean() > stacked[..., 0].mean():
        direction[0] = -1
    values = (stacked * direction).flatten(0, 2).sort(dim=0).values
    low, high = (values[round(share * (len(values) - 1))] for share in (CLIPPED, 1 - CLIPPED))
    extent = (high - low).clamp(min=TINY)  # a component that is the same everywhere becomes 0
    return [
        {name: ((part * direction - low) / extent).clamp(0, 1) for name, part in maps.items()} for maps in components
    ]


def feature_maps(features: dict[str, torch.Tensor], config: FlorenceVLConfig) -> dict[str, torch.Tensor]:
    """
    Map the first three principal components of an image's features to red, green and blue.

    All maps have one basis and one scale, as described in `PrincipalComponents`.

    Args:
        features (`dict[str, torch.Tensor]`, each of shape `(1, num_feature_tokens, hidden_size)`):
            Features of one image, as `get_image_features(...).features`.
        config (`FlorenceVLConfig`): Configuration of the model.

    Returns:
        `dict[str, torch.Tensor]`, each of shape `(feature_grid_size, feature_grid_size, 3)`: a map in float32 on the
        CPU under each name of `features`, with values from 0 to 1. Empty if the only `image_feature_source` is
        `spatial_avg_pool`, a mean over all positions.
    """
    tokens = {name: feature[0].float().cpu() for name, feature in features.items()}
    maps = ImageFeatures(tokens, (config.feature_grid_size,) * 2, position_tokens(config)).maps
    return scale_components([PrincipalComponents([maps]).transform(maps)])[0] if maps else {}


def background_threshold(maps: list[dict[str, torch.Tensor]]) -> float:
    """Return the value of the first component, scaled to 0..1, that separates two classes best (Otsu's method)."""
    values = torch.cat([part[..., 0].flatten() for of_image in maps for part in of_image.values()])
    levels = (values * 255).round().long()
    counts = torch.bincount(levels, minlength=256).double()
    below = counts.cumsum(0)[:-1]  # positions up to each level but the last
    moments = (counts * torch.arange(256)).cumsum(0)
    separation = (moments[-1] * below / len(values) - moments[:-1]) ** 2 / (below * (len(values) - below)).clamp(min=1)
    return (int(separation.argmax()) + 0.5) / 255


@dataclass(frozen=True)
class Similarities:
    """
    Cosine similarities of all positions of a feature map, in little space.

    The similarity of positions `i` and `j` is about `(vectors[i] * scales) @ (vectors[j] * scales)`, with an error of
    at most `error`.
    """

    vectors: torch.Tensor  # int8, (num_positions, num_components)
    scales: torch.Tensor  # float32, (num_components,)
    error: float


def compress_similarities(feature_map: torch.Tensor, num_components: int = 64) -> Similarities:
    """Compress the cosine similarities of a map of shape `(height, width, hidden_size)`: low rank, in 8 bits."""
    unit = torch.nn.functional.normalize(feature_map.double().flatten(0, 1), dim=1)
    exact = unit @ unit.T
    variances, directions = torch.linalg.eigh(exact)
    components = (directions * variances.clamp(min=0).sqrt())[:, -num_components:]
    scales = (components.abs().amax(dim=0) / 127).clamp(min=TINY).float()
    vectors = (components / scales).round().to(torch.int8)
    restored = vectors.double() * scales.double()
    return Similarities(vectors, scales, float((restored @ restored.T - exact).abs().max()))


__all__ = [
    "PrincipalComponents",
    "Similarities",
    "background_threshold",
    "compress_similarities",
    "feature_maps",
    "scale_components",
]
