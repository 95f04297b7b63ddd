# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Facts of model cards, by the way in which a model was made. The templates beside this file render them."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import ModelCard
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils import yaml_dump
from transformers.utils import logging

from ..modeling import FlorenceVLConfig
from ..processing import FlorenceVLProcessor, load_chat_template
from ..templates import template_environment
from .published import PUBLISHED_CHECKPOINTS


logger = logging.get_logger(__name__)

CARD_FILE = "README.md"
# Key of a card's metadata that holds a `Training` as a plain dict.
TRAINING_KEY = "florence_vl_training"


@strict
@dataclass(kw_only=True)
class Training:
    """
    Facts of a training run, which a card also holds in its metadata. All values must be valid JSON.

    `trained_parameters` counts by part, without LoRA. `num_skipped` counts a broken sample each time it was skipped.
    `best_step` is that of the saved weights, if not the last one. `evaluations` are metrics of the saved weights by
    evaluation set.
    """

    stage: str
    trained_parameters: dict[str, int]
    lora_parameters: int = 0
    dataset: str
    num_samples: int
    num_skipped: int = 0
    num_steps: int
    num_epochs: int | float
    best_step: int | None = None
    last_loss: int | float | None = None
    max_length: int
    settings: dict[str, Any]
    versions: dict[str, str]
    evaluations: dict[str, dict[str, int | float]] = field(default_factory=dict)


@dataclass(kw_only=True)
class Card:
    """
    The facts of every card, and all that is known of a model which was only saved. `name` is that of its directory, or
    its Hub id.
    """

    name: str
    config: FlorenceVLConfig
    processor: FlorenceVLProcessor

    template: ClassVar[str] = "saved.md.jinja"
    is_adapter = False

    @property
    def takes_images_alone(self) -> bool:
        """Whether the prompt is an image without a question, as in pretraining."""
        tokenizer, image_token = self.processor.tokenizer, self.processor.image_token
        try:
            return self.processor.chat_template in (None, load_chat_template("plain", tokenizer, image_token))
        except ValueError:  # the tokenizer supports none of this package's templates
            return False


@dataclass(kw_only=True)
class ConvertedCard(Card):
    """
    A model that was converted from `source`, an original checkpoint, or an adapter of the model `base`.

    `chat_template` is a name, `None` for the template of `base`. `num_added_rows` counts rows of zeros in embedding
    tables, `num_unused` tensors that the model does not use. `assumptions` are sentences.
    """

    source: str | Path
    base: str | Path | None = None
    num_parameters: int
    chat_template: str | None = None
    cast_to: str | None = None
    num_added_rows: int = 0
    num_unused: int = 0
    assumptions: Sequence[str] = ()

    template = "converted.md.jinja"


@dataclass(kw_only=True)
class TrainedCard(Card):
    """
    A model or an adapter that was trained from the model `base` with this package.

    `num_parameters` does not count LoRA. `datasets` are Hub ids of training data.
    """

    base: str | Path
    training: Training
    num_parameters: int
    is_adapter: bool = False
    datasets: list[str] = field(default_factory=list)

    template = "trained.md.jinja"


@dataclass(kw_only=True)
class MergedCard(Card):
    """A model into which an adapter was merged, with the training and the metadata of the adapter's card."""

    base: str | Path
    adapter: str | Path
    num_parameters: int
    training: Training | None = None
    adapter_metadata: dict[str, Any] = field(default_factory=dict)

    template = "merged.md.jinja"


def hub_id(path_or_id: str | Path) -> str | None:
    """Return a Hub id as it is, `None` for a local file or directory."""
    return None if Path(path_or_id).exists() else str(path_or_id)


def public_name(path_or_id: str | Path) -> str:
    """Return a Hub id, or the name of a local file or directory without its location."""
    return hub_id(path_or_id) or Path(path_or_id).resolve().name


def write_card(directory: Path, card: Card) -> None:
    """Render a card as the `README.md` of a model's directory."""
    environment = template_environment(Path(__file__).parent, keep_trailing_newline=True)
    environment.globals |= {"hub_id": hub_id, "public_name": public_name, "training_key": TRAINING_KEY}
    environment.filters["yaml"] = _to_yaml
    text = environment.get_template(card.template).render(card=card, published_checkpoints=PUBLISHED_CHECKPOINTS)
    (directory / CARD_FILE).write_text(text, encoding="utf-8")


def _to_yaml(metadata: dict[str, Any]) -> str:
    # Through JSON, since YAML would keep subclasses such as `TorchVersion` as Python objects.
    plain = json.loads(json.dumps(metadata, default=asdict))
    return yaml_dump({name: value for name, value in plain.items() if value}, sort_keys=False).strip()


def read_metadata(directory: Path) -> dict[str, Any]:
    """Read the metadata of a directory's card, `{}` if there is none. Invalid metadata raises a `ValueError`."""
    path = directory / CARD_FILE
    try:
        return ModelCard.load(path).data.to_dict() if path.is_file() else {}
    except Exception as error:  # of YAML, of the encoding, or of the card
        raise ValueError(f"{path} has metadata that cannot be read ({error}); correct it.") from error


def read_training(directory: Path) -> Training | None:
    """Read the facts of training from a directory's card, `None` if it has none."""
    facts = read_metadata(directory).get(TRAINING_KEY)
    try:
        return None if facts is None else Training(**facts)
    except (TypeError, StrictDataclassError) as error:
        logger.warning(f"Ignoring `{TRAINING_KEY}` of {directory / CARD_FILE}: {' '.join(str(error).split())}")
        return None
