# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Features of images as colour maps, in one HTML file without links or as a PNG."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from textwrap import wrap
from typing import Any

import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from ..conversion.checkpoint_files import write_file
from ..modeling import FlorenceVLForConditionalGeneration
from ..modeling.configuration_florence_vl import IMAGE_FEATURE
from ..processing import FlorenceVLProcessor
from ..processing.images import data_url, find_images
from ..templates import template_environment
from .attention import AnswerAttention, attend
from .extraction import VisionEncoder, extract_features, open_image, position_tokens
from .feature_maps import (
    PrincipalComponents,
    Similarities,
    background_threshold,
    compress_similarities,
    scale_components,
)


# Longest side of an image on the page, in pixels.
THUMBNAIL_SIZE = 384
# Images whose similarities and answers a page holds, 0.2 MB each at 24 x 24 positions, and of a PNG. Of further
# images, an HTML page has the colours alone, about 40 kB each.
MAX_DETAILED = 50
# Features of as many images are kept in memory between the two passes over them; those of more are computed twice.
MAX_KEPT = 16
# Of positions of the background, from 0 to 255.
BACKGROUND_OPACITY = 70


@dataclass
class Row:
    """What is shown of one image."""

    path: Path
    name: str
    size: tuple[int, int]  # width and height
    thumbnail: str  # a data URL
    maps: dict[str, torch.Tensor] = field(default_factory=dict)  # by name, uint8 of shape (height, width, 3)
    similarities: dict[str, Similarities] = field(default_factory=dict)
    answer: AnswerAttention | None = None


@dataclass
class FeaturePage:
    """Maps of all images, with what explains them."""

    rows: list[Row]
    captions: dict[str, str]  # of each map, by name
    grid_size: int
    positions: slice
    is_padded: bool  # whether maps show images padded to a square
    background: float  # threshold of the first component, from 0 to 1
    explained_variance: float | None  # of one basis for all images
    untrained: list[str]
    question: str | None = None
    layer: int | None = None

    @property
    def similarities(self) -> list[Similarities]:
        return [one for row in self.rows for one in row.similarities.values()]


def read_images(paths: Sequence[Path]) -> list[Row]:
    """
    Read image files and the images in directories, which are named relative to them.

    Raises:
        ValueError: If a file is not an image, or a directory has none.
    """
    files: list[tuple[Path, str]] = []
    for path in paths:
        found = [(file, str(file.relative_to(path))) for file in find_images(path)] if path.is_dir() else None
        if found == []:
            raise ValueError(f"{path} has no images; give image files, or directories of images.")
        files += found or [(path, path.name)]
    rows = []
    with tqdm(files, desc="Reading images") as progress:  # ended before an error is printed
        for file, name in progress:
            image = open_image(file)
            image.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
            rows.append(Row(file, name, image.size, data_url(image, "JPEG", quality=85)))
    return rows


def is_untrained(part: torch.nn.Module) -> bool:
    """
    Return whether all normalization layers of a network have weights of 1 and biases of 0, as initialized.

    Of a network without such layers, all biases are 0. Training changes that; random weights of other kinds are not
    recognized.
    """
    norms = [module for module in part.modules() if "Norm" in type(module).__name__]
    initial = {"weight": 1, "bias": 0} if norms else {"bias": 0}
    found = [
        (parameter, initial[kind])
        for module in norms or [part]
        for name, parameter in module.named_parameters()
        if (kind := name.rpartition(".")[2]) in initial
    ]
    return bool(found) and all(bool((parameter == value).all()) for parameter, value in found)


def build_page(
    encoder: VisionEncoder,
    rows: list[Row],
    prompts: Mapping[str, str] | None = None,
    *,
    features: Sequence[str] | None = None,
    per_image: bool = False,
    background: float | None = None,
    batch_size: int = 8,
) -> FeaturePage:
    """
    Compute the maps of images, and their similarities.

    Args:
        encoder (`VisionEncoder`): The model.
        rows (`list[Row]`): Images of `read_images`. Features of more than 16 are computed twice, for little memory.
        prompts, batch_size: As in `extract_features`.
        features (sequence of `str`, *optional*): Which features are shown, in order: `image` (V) and names of prompts.
            By default, all.
        per_image (`bool`, *optional*, defaults to `False`): Whether each image has a basis and a scale of its own.
        background (`float`, *optional*): Value of the first component, from 0 to 1, below which positions are
            background. By default, Otsu's threshold.

    Raises:
        ValueError: If a feature or the feature map does not exist, or a prompt is invalid.
    """
    config = encoder.config
    all_captions = {IMAGE_FEATURE: "Without a prompt.", **config.prompts, **(prompts or {})}
    if unknown := [name for name in features or [] if name not in all_captions]:
        choices = ", ".join(all_captions)
        raise ValueError(f"There is no feature {unknown[0]!r}; choose from {choices}, or add a prompt.")
    captions = {name: all_captions[name] for name in features or all_captions}
    if not position_tokens(config).stop:
        raise ValueError("The model has no feature map: its only `image_feature_source` is an average.")

    def maps(description: str) -> Iterator[dict[str, torch.Tensor]]:
        extracted = extract_features(encoder, [row.path for row in rows], prompts, batch_size=batch_size)
        for image in tqdm(extracted, desc=description, total=len(rows)):
            yield {name: image.maps[name] for name in captions}

    kept = list(maps("Computing features")) if len(rows) <= MAX_KEPT else None
    shared = None if per_image else PrincipalComponents(kept or maps("Computing the basis"))
    scaled = []
    for row, of_image in zip(rows, kept or maps("Computing maps"), strict=True):
        components = (shared or PrincipalComponents([of_image])).transform(of_image)
        scaled += [components] if shared else scale_components([components])
        if len(scaled) <= MAX_DETAILED:
            row.similarities = {name: compress_similarities(feature_map) for name, feature_map in of_image.items()}
    scaled = scale_components(scaled) if shared else scaled
    for row, colors in zip(rows, scaled, strict=True):
        row.maps = {name: (part * 255).round().byte() for name, part in colors.items()}
    return FeaturePage(
        rows,
        captions,
        config.feature_grid_size,
        position_tokens(config),
        bool(getattr(encoder.image_processor, "do_pad", False)),
        background_threshold(scaled) if background is None else background,
        shared.explained_variance if shared else None,
        ["vision encoder"] if is_untrained(encoder.vision_tower) else [],
    )


def add_answers(
    page: FeaturePage,
    model: FlorenceVLForConditionalGeneration,
    processor: FlorenceVLProcessor,
    question: str,
    layer: int | None = None,
) -> None:
    """Ask a question about each image of a page, and add what each word of the answer attends to, as `attend`."""
    for row in tqdm(page.rows, desc="Answering"):
        row.answer = attend(model, processor, open_image(row.path), question, layer)
    page.question, page.layer = question, layer
    parts = {"projector": model.model.multi_modal_projector, "language model": model.model.language_model}
    page.untrained += [name for name, part in parts.items() if is_untrained(part)]


def write_html(page: FeaturePage, path: Path, title: str) -> None:
    """Write a page that browsers open without a network, the same for the same maps."""
    environment = template_environment(Path(__file__).parent, autoescape=True)
    environment.filters |= {
        "base64": lambda tensor: base64.b64encode(tensor.contiguous().numpy().tobytes()).decode(),
        "attention": _attention,
    }
    names = {"labels": _labels(page), "max_detailed": MAX_DETAILED, "opacity": BACKGROUND_OPACITY}
    template = environment.get_template("page.html.jinja")
    write_file(path, template.render(page=page, title=title, **names))


def _labels(page: FeaturePage) -> dict[str, str]:
    return {name: "V" if name == IMAGE_FEATURE else name for name in page.captions}


def _attention(answer: AnswerAttention, positions: slice) -> Iterator[dict[str, Any]]:
    """Yield of each word its weights as bytes, relative to the largest, and its sums over all tokens and some."""
    for word, weights in zip(answer.words, answer.weights, strict=True):
        shown = weights[:, positions]
        relative = (shown * (255 / shown.max().clamp(min=1e-12))).round().byte()
        total = float(weights.sum())
        yield {"text": word, "weights": relative, "total": total, "other": max(0.0, total - float(shown.sum()))}


def write_png(page: FeaturePage, path: Path, title: str) -> None:
    """Draw the maps of each image in a row, with the background dimmed, and of an answer its mean attention."""
    from matplotlib.figure import Figure  # without a display, and without global state

    labels = ["image", *_labels(page).values(), *([] if page.question is None else ["attention"])]
    files = [BytesIO(base64.b64decode(row.thumbnail.partition(",")[2])) for row in page.rows]
    side = (THUMBNAIL_SIZE, THUMBNAIL_SIZE)
    images = [ImageOps.pad(Image.open(file), side) if page.is_padded else Image.open(file) for file in files]
    caption = 0.1 if page.question is None else 0.4
    heights = [2 * image.height / image.width + caption for image in images]  # in inches
    figure = Figure(figsize=(2 * len(labels), sum(heights) + 0.5), dpi=120, layout="constrained")
    grid = figure.subplots(len(images), len(labels), squeeze=False, height_ratios=heights)
    for row, image, axes in zip(page.rows, images, grid, strict=True):
        extent = (0, image.width, image.height, 0)
        axes[0].imshow(image, extent=extent)
        for axis, colors in zip(axes[1:], row.maps.values(), strict=False):
            is_background = colors[..., :1] < 255 * page.background
            opacity = torch.where(is_background, BACKGROUND_OPACITY, 255).byte()
            axis.imshow(torch.cat([colors, opacity], dim=-1).numpy(), extent=extent)
        if row.answer is not None and row.answer.words:
            weights = row.answer.weights[..., page.positions].mean(dim=0).sum(dim=0)
            axes[-1].imshow(image, extent=extent)
            axes[-1].imshow(weights.unflatten(0, (page.grid_size, -1)).numpy(), alpha=0.65, extent=extent)
            axes[-1].set_xlabel("\n".join(wrap(" ".join(row.answer.words), 28)), fontsize=7, parse_math=False)
    for axis in grid.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for axis, label in zip(grid[0], labels, strict=True):
        axis.set_title(label, fontsize=10, parse_math=False)
    note = f" (untrained: {', '.join(page.untrained)})" if page.untrained else ""
    figure.suptitle(title + note, fontsize=10, parse_math=False)
    file = BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})  # which names a version
    write_file(path, file.getvalue())


__all__ = ["FeaturePage", "Row", "add_answers", "build_page", "read_images", "write_html", "write_png"]
