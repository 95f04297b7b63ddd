# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""How well frozen visual features fit text: a linear map that is trained, and two measures without training."""

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cosine_similarity, normalize
from tqdm import tqdm

from ..conversion.checkpoint_files import locked
from ..modeling.configuration_florence_vl import IMAGE_FEATURE
from .encoders import digest_of, encode_items, florence_encoder, image_encoder, language_encoder
from .extraction import open_image


# Fraction of the images that the linear map is not trained on.
HELD_OUT = 0.2
MIN_IMAGES = 20
NUM_NEIGHBORS = 10
# Rows of a matrix of similarities that are in memory at once.
ROWS_PER_CHUNK = 1024
# Digits of the results. Further ones depend on the machine.
NUM_DIGITS = 6


def fit_linear_map(
    features: torch.Tensor,
    targets: torch.Tensor,
    held_out: torch.Tensor,
    num_steps: int = 300,
    learning_rate: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Train one linear map from features to targets, which minimises the mean of 1 - cosine.

    Channels are standardised by their mean and standard deviation in the training part. The bias is the best constant
    output, the mean direction of the targets; the weights start at 0, so that the first loss is that without features.
    Each step of Adam uses the whole training part. The learning rate is divided by the number of channels, so that a
    step changes the output equally for few channels and for many.

    Args:
        features (`torch.Tensor` of shape `(num_pairs, num_channels)`): The inputs, in float32.
        targets (`torch.Tensor` of shape `(num_pairs, hidden_size)`): The outputs, in float32.
        held_out (`torch.Tensor` of shape `(num_pairs,)`): Which pairs are not trained on, as booleans.
        num_steps (`int`, *optional*, defaults to 300): Number of steps.
        learning_rate (`float`, *optional*, defaults to 1.0): Learning rate of one channel.

    Returns:
        `tuple`: 1 - cosine before each step and after the last: the mean over the training part, of shape
        `(num_steps + 1,)`, and of each held-out pair, of shape `(num_steps + 1, num_held_out)`.
    """
    train = ~held_out
    deviation, mean = torch.std_mean(features[train], dim=0)
    # A channel that is the same for all images stays 0.
    features = (features - mean) / deviation.where(deviation > 0, 1.0)
    targets = normalize(targets, dim=-1) * targets.shape[1] ** 0.5  # elements of about 1
    # Trained, it would begin with steps of full size along rounding errors: its first gradient is 0.
    bias = targets[train].mean(dim=0)
    weight = features.new_zeros(features.shape[1], targets.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=learning_rate / len(weight))
    train_losses, held_out_losses = [], []
    for _ in range(num_steps + 1):
        loss = (1 - cosine_similarity(features[train] @ weight + bias, targets[train])).mean()
        train_losses.append(loss.detach())
        with torch.no_grad():
            held_out_losses.append(1 - cosine_similarity(features[held_out] @ weight + bias, targets[held_out]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.stack(train_losses).cpu(), torch.stack(held_out_losses).cpu()


def mutual_knn(x: torch.Tensor, y: torch.Tensor, k: int = NUM_NEIGHBORS) -> float:
    """
    Compute which part of the k nearest neighbours of a sample is the same in two spaces, averaged over the samples.

    Neighbours are the other samples with the highest cosine similarity. The result is 1 if all neighbours are the
    same, and about `k / (num_samples - 1)` for unrelated spaces.

    Source: Huh et al., "The Platonic Representation Hypothesis", ICML 2024 (arXiv 2405.07987).

    Args:
        x, y (`torch.Tensor` of shape `(num_samples, num_channels)`): The samples in both spaces, in the same order.
        k (`int`, *optional*, defaults to 10): Number of neighbours.

    Raises:
        ValueError: If `x` and `y` have different numbers of samples, or at most `k`.
    """
    _check_samples(x, y, more_than=k)
    x, y = normalize(x.float(), dim=-1), normalize(y.float(), dim=-1)
    num_shared = 0
    for rows in torch.arange(len(x), device=x.device).split(ROWS_PER_CHUNK):
        num_shared += int((_are_neighbors(x, rows, k) & _are_neighbors(y, rows, k)).sum())
    return num_shared / (k * len(x))


def _are_neighbors(samples: torch.Tensor, rows: torch.Tensor, k: int) -> torch.Tensor:
    """Return booleans of shape `(num_rows, num_samples)`: whether a sample is a neighbour of a row's."""
    similarities = samples[rows] @ samples.T
    similarities.scatter_(1, rows[:, None], -torch.inf)  # no sample is its own neighbour
    return torch.zeros_like(similarities, dtype=torch.bool).scatter_(1, similarities.topk(k).indices, True)


def linear_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """
    Compute the centred kernel alignment of two spaces with a linear kernel, from 0 to 1.

    It is 1 if the spaces differ by a rotation, a shift and one scale. Of unrelated spaces it is far from 0 if they
    have many channels for the number of samples.

    Source: Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019 (arXiv 1905.00414).

    Args:
        x, y (`torch.Tensor` of shape `(num_samples, num_channels)`): The samples in both spaces, in the same order.

    Raises:
        ValueError: If `x` and `y` have different numbers of samples, or one.
    """
    _check_samples(x, y, more_than=1)
    x, y = (samples.cpu().double() for samples in (x, y))
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    norms = torch.linalg.matrix_norm(x.T @ x) * torch.linalg.matrix_norm(y.T @ y)
    # Samples that are all the same have no similarity to anything.
    return float((y.T @ x).square().sum() / norms) if norms > 0 else 0.0


def _check_samples(x: torch.Tensor, y: torch.Tensor, more_than: int) -> None:
    if len(x) != len(y) or len(x) <= more_than:
        raise ValueError(
            f"Got {len(x)} and {len(y)} samples, expected the same number of both, more than {more_than}."
        )


def align(
    pairs: Sequence[dict[str, str]],
    model: str | Path,
    cache: str | Path,
    *,
    llm: str | Path | None = None,
    encoders: Sequence[str | Path] = (),
    batch_size: int = 8,
    dtype: torch.dtype | None = None,
    device: str = "auto",
    seed: int = 0,
) -> dict[str, Any]:
    """
    Measure how well visual features of images fit a language model's states of their captions.

    Visual features are means over all tokens of an image: of V, of V't of each prompt, of every concatenation of these
    along channels, and of the output of other encoders. A caption's state is the mean of the last hidden states of the
    frozen language model over the caption's tokens, without those that the tokenizer adds.

    Args:
        pairs (`Sequence[dict]`): `image`, a path, and `caption` of each pair. An image may have several captions.
        model (`str` or `Path`): Directory or Hub id of a Florence-VL, or of a Florence-2.
        cache (`str` or `Path`): Directory that keeps the features of each model, image and caption.
        llm (`str` or `Path`, *optional*): Directory or Hub id of the language model. By default, that of `model`.
        encoders (`Sequence[str | Path]`, *optional*): Directories or Hub ids of other encoders, which `AutoModel`
            loads. Of a model for images and text, such as CLIP, the vision part is used.
        batch_size (`int`, *optional*, defaults to 8): Number of images or captions per batch.
        dtype (`torch.dtype`, *optional*): Dtype of all models. By default, that of each.
        device (`str`, *optional*, defaults to `"auto"`): Device of all models.
        seed (`int`, *optional*, defaults to 0): Chooses the held-out images.

    Returns:
        `dict`: `settings`; `constant`, the loss without features; `results`, a list of dicts, one per set of features;
        and `errors`, the message of each image that was left out.

    Raises:
        ValueError: If a model cannot be loaded, or fewer than 20 images can be read.
    """
    if device == "auto":
        device = str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"
    # All are found before anything is computed.
    others = [image_encoder(encoder, dtype, device) for encoder in encoders]
    language_model, florence = language_encoder(llm or model, dtype, device), florence_encoder(model, dtype, device)
    digests = {path: digest_of(Path(path)) for path in dict.fromkeys(pair["image"] for pair in pairs)}
    paths = {digest: path for path, digest in digests.items()}
    errors: dict[str, str] = {}
    with locked(Path(cache)):
        visual = [encode_items(e, paths, cache, batch_size, open_image, errors) for e in (florence, *others)]
        pairs = [pair for pair in pairs if digests[pair["image"]] not in errors]
        images = [digests[pair["image"]] for pair in pairs]
        if len(set(images)) < MIN_IMAGES:
            first = next((f" The first error: {error}" for error in errors.values()), "")
            raise ValueError(f"Got {len(set(images))} images to align, expected at least {MIN_IMAGES}.{first}")
        captions = {digest_of(pair["caption"]): pair["caption"] for pair in pairs}
        textual = encode_items(language_model, captions, cache, batch_size)
    targets = torch.stack([textual[digest_of(pair["caption"])]["tokens"] for pair in pairs])

    # Sorted, because files of the cache do not keep the order.
    names = sorted(visual[0][images[0]], key=lambda name: (name != IMAGE_FEATURE, name))
    subsets = [subset for size in range(1, len(names) + 1) for subset in combinations(names, size)]
    sets = [("+".join(subset), visual[0], subset) for subset in subsets]
    sets += [(other.name, visual[i], ("tokens",)) for i, other in enumerate(others, start=1)]
    order = torch.randperm(len(set(images)), generator=torch.Generator().manual_seed(seed)).tolist()
    results = []
    for label, of_images, subset in tqdm(sets, desc="Linear maps", unit="map"):
        # (num_pairs, num_channels)
        features = torch.stack([torch.cat([of_images[image][name] for name in subset]) for image in images])
        results.append({"features": label, **_measure(features, targets, images, order, device)})
    settings = {
        "model": str(model),
        "llm": str(llm or model),
        "dtype": str(dtype or "auto"),
        "seed": seed,
        "num_pairs": len(pairs),
        "num_images": len(order),
        "num_neighbors": NUM_NEIGHBORS,
    }
    listed = [{"image": paths[digest], "error": error} for digest, error in errors.items()]
    alignment = {"settings": settings, "constant": results[0]["curve"][0], "results": results, "errors": listed}
    return json.loads(json.dumps(alignment), parse_float=lambda number: round(float(number), NUM_DIGITS))


def _measure(
    features: torch.Tensor, targets: torch.Tensor, images: list[str], order: list[int], device: str
) -> dict[str, Any]:
    """Compare features and targets of pairs with the digests `images`. `order` permutes the different images."""
    last = {image: i for i, image in enumerate(images)}
    # All captions of an image are held out, or none.
    chosen = {list(last)[i] for i in order[: round(HELD_OUT * len(order))]}
    held_out = torch.tensor([image in chosen for image in images])
    train_losses, losses = fit_linear_map(features.to(device), targets.to(device), held_out.to(device))
    curve = losses.mean(dim=1)
    best = int(curve.argmin())
    # Captions of one image would be neighbours of each other in both spaces: one of them is compared.
    x, y = features[[*last.values()]], targets[[*last.values()]]
    return {
        "num_channels": features.shape[1],
        "loss": float(curve[best]),
        "standard_error": float(losses[best].std() / len(losses[best]) ** 0.5),
        "best_step": best,
        "final_loss": float(curve[-1]),
        "mutual_knn": mutual_knn(x, y),
        "linear_cka": linear_cka(x, y),
        "linear_cka_shuffled": linear_cka(x, y[order]),
        "curve": curve.tolist(),
        "train_curve": train_losses.tolist(),
    }


__all__ = ["align", "fit_linear_map", "linear_cka", "mutual_knn"]
