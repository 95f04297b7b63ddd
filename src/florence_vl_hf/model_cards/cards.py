# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Facts of model cards, by the way in which a model was made, and their rendering."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from transformers.utils import logging

from ..modeling import FlorenceVLConfig
from ..processing import FlorenceVLProcessor, load_chat_template
from .published import VISION_TOWER, PublishedCheckpoint


logger = logging.get_logger(__name__)

CARD_FILE = "README.md"
# Key of a card's metadata that holds a `Training` as a plain dict.
TRAINING_KEY = "florence_vl_training"


def hub_id(path_or_id: str | Path) -> str | None:
    """Return a Hub id as it is, `None` for a local file or directory."""
    return None if Path(path_or_id).exists() else str(path_or_id)


def public_name(path_or_id: str | Path) -> str:
    """Return a Hub id, or the name of a local file or directory without its location."""
    return hub_id(path_or_id) or Path(path_or_id).resolve().name


def verify_commands(source: str | Path, output: str | Path, script: str | Path = "record_reference.py") -> list[str]:
    """Return the commands that compare a converted checkpoint with the outputs of the original code."""
    return [
        f"python {script} --checkpoint {source} --images IMAGES --output reference.safetensors",
        f"florence-vl verify {output} --reference reference.safetensors",
    ]


@strict
@dataclass(kw_only=True)
class Training:
    """
    Facts of a training run, which a card also holds in its metadata. All values must be valid JSON.

    Args:
        trained_parameters (`dict[str, int]`): Number of trained parameters by part, without those of LoRA.
        lora_parameters (`int`): Number of parameters that LoRA adds.
        dataset (`str`): Public name of the training data.
        num_skipped (`int`): Broken samples that were skipped, counted each time.
        best_step (`int`, *optional*): The step whose weights were saved, if it is not the last one.
        last_loss (`float`, *optional*): The last training loss that was logged.
        settings (`dict[str, Any]`): Hyperparameters by name.
        versions (`dict[str, str]`): Versions of packages.
        evaluations (`dict[str, dict[str, float]]`): Metrics of the saved weights by evaluation set.
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

    @property
    def metrics(self) -> list[str]:
        return sorted({name for metrics in self.evaluations.values() for name in metrics})

    def to_metadata(self) -> dict[str, Any]:
        # Through JSON, since YAML would keep subclasses such as `TorchVersion` as Python objects.
        return json.loads(json.dumps(asdict(self)))


@dataclass(kw_only=True)
class Card:
    """Facts of every card: the model's name (its directory's or its Hub id), configuration and processor."""

    name: str
    config: FlorenceVLConfig
    processor: FlorenceVLProcessor

    template: ClassVar[str]
    is_adapter = False

    @property
    def metadata(self) -> dict[str, Any]:
        """Metadata beside the pipeline, the library and the tags."""
        return {}

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
    A model that was converted from an original checkpoint.

    Args:
        source (`str` or `Path`): Directory or Hub id of the original checkpoint.
        base (`str` or `Path`, *optional*): If `source` is an adapter, directory or Hub id of its base model.
        chat_template (`str`, *optional*): Name of the chat template; `None` if it is the base model's.
        cast_to (`str`, *optional*): Name of the dtype that the weights were cast to.
        num_added_rows (`int`): Number of zero rows that were added to the embedding tables.
        num_unused (`int`): Number of tensors of the original that the model does not use.
        assumptions (`list[str]`): Sentences, with public names of directories.
    """

    source: str | Path
    base: str | Path | None = None
    num_parameters: int
    chat_template: str | None = None
    cast_to: str | None = None
    num_added_rows: int = 0
    num_unused: int = 0
    assumptions: list[str] = field(default_factory=list)

    template = "converted.md.jinja"
    vision_tower = VISION_TOWER

    @property
    def published(self) -> PublishedCheckpoint | None:
        return PublishedCheckpoint.of(hub_id(self.source) or "") if self.base is None else None

    @property
    def verify_commands(self) -> list[str]:
        return verify_commands(hub_id(self.source) or "ORIGINAL", self.name)

    @property
    def metadata(self) -> dict[str, Any]:
        base_models = [name for path in (self.base, self.source) if path is not None and (name := hub_id(path))]
        if self.published is None:
            return {"base_model": base_models or None}
        language_model = self.published.language_model
        return {
            "license": language_model.license,
            "base_model": [*base_models, language_model.hub_id, VISION_TOWER],
            "datasets": self.published.datasets,
        }

    @property
    def takes_images_alone(self) -> bool:
        is_pretrained = self.published is not None and self.published.stage == "pretrain"
        return is_pretrained or super().takes_images_alone


@dataclass(kw_only=True)
class TrainedCard(Card):
    """
    A model or an adapter that was trained with this package.

    Args:
        base (`str` or `Path`): Directory or Hub id of the model that training started from.
        num_parameters (`int`): Number of parameters of the model, without those of LoRA.
        is_adapter (`bool`): Whether the directory contains an adapter instead of a model.
        datasets (`list[str]`): Hub ids of the training data that is on the Hub.
    """

    base: str | Path
    training: Training
    num_parameters: int
    is_adapter: bool = False
    datasets: list[str] = field(default_factory=list)

    template = "trained.md.jinja"

    @property
    def metadata(self) -> dict[str, Any]:
        return {
            "base_model": hub_id(self.base),
            "datasets": self.datasets or None,
            TRAINING_KEY: self.training.to_metadata(),
        }


@dataclass(kw_only=True)
class MergedCard(Card):
    """
    A model into which an adapter was merged.

    Args:
        base (`str` or `Path`): Directory or Hub id of the model below the adapter.
        adapter (`str` or `Path`): Directory or Hub id of the adapter.
        training (`Training`, *optional*): Training of the adapter, as `read_training` returns it.
        adapter_metadata (`dict[str, Any]`): Metadata of the adapter's card, as `read_metadata` returns it.
    """

    base: str | Path
    adapter: str | Path
    num_parameters: int
    training: Training | None = None
    adapter_metadata: dict[str, Any] = field(default_factory=dict)

    template = "merged.md.jinja"

    @property
    def metadata(self) -> dict[str, Any]:
        kept = {name: self.adapter_metadata.get(name) for name in ("license", "language", "datasets")}
        training = {} if self.training is None else {TRAINING_KEY: self.training.to_metadata()}
        return {"base_model": hub_id(self.base), **kept, **training}


@dataclass(kw_only=True)
class SavedCard(Card):
    """A complete model of which nothing is known but its configuration and processor."""

    template = "saved.md.jinja"


def write_card(directory: Path, card: ConvertedCard | TrainedCard | MergedCard | SavedCard) -> None:
    """Render a card as the `README.md` of a model's directory."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # Markdown, not HTML
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals |= {"count": _count, "public_name": public_name}
    metadata = ModelCardData(
        pipeline_tag="image-text-to-text",
        library_name="peft" if card.is_adapter else "transformers",
        tags=["florence-vl", "florence2", *(["lora"] if card.is_adapter else [])],
        **card.metadata,
    )
    text = environment.get_template(card.template).render(card=card, metadata=metadata.to_yaml())
    (directory / CARD_FILE).write_text(text, encoding="utf-8")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def read_metadata(directory: Path) -> dict[str, Any]:
    """
    Read the metadata of a directory's card; empty without a card or metadata.

    Raises:
        ValueError: If the metadata is not valid YAML.
    """
    path = directory / CARD_FILE
    if not path.is_file():
        return {}
    try:
        return ModelCard.load(path).data.to_dict()
    except Exception as error:  # of YAML, of the encoding, or of the card
        raise ValueError(f"{path} has metadata that cannot be read ({error}); correct it.") from error


def read_training(directory: Path) -> Training | None:
    """Read the facts of training from a directory's card; `None` if it has none."""
    facts = read_metadata(directory).get(TRAINING_KEY)
    try:
        return None if facts is None else Training(**facts)
    except (TypeError, StrictDataclassError) as error:
        logger.warning(f"Ignoring `{TRAINING_KEY}` of {directory / CARD_FILE}: {' '.join(str(error).split())}")
        return None


__all__ = [
    "CARD_FILE",
    "ConvertedCard",
    "MergedCard",
    "SavedCard",
    "TrainedCard",
    "Training",
    "hub_id",
    "public_name",
    "read_metadata",
    "read_training",
    "verify_commands",
    "write_card",
]
