# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Commands of `conversion`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .options import Device, DtypeName, ImageFeatureSource, MaxShardSize, Model, Output, split, torch_dtype


if TYPE_CHECKING:
    from ..conversion import ConvertedCheckpoint


def convert(
    source: Annotated[str, typer.Argument(help="Directory or Hub id of an original Florence-VL checkpoint.")],
    output: Output,
    vision_tower: Annotated[
        str | None,
        typer.Option(help="Directory or Hub id of the checkpoint's Florence-2, if SOURCE does not contain it."),
    ] = None,
    image_feature_source: ImageFeatureSource = None,
    dtype: Annotated[DtypeName | None, typer.Option(help="By default, as in the checkpoint.")] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="llama3, phi3, vicuna or plain. By default, detected from the checkpoint.")
    ] = None,
    max_shard_size: MaxShardSize = "1GB",
    base: Annotated[
        str | None,
        typer.Option(help="If SOURCE contains only a projector or LoRA: directory or Hub id of its base model."),
    ] = None,
) -> None:
    """Convert an original checkpoint to a model for Transformers."""
    from ..conversion import convert as convert_checkpoint
    from ..conversion.reference import RECORD_SCRIPT
    from ..model_cards import hub_id, verify_commands

    checkpoint = convert_checkpoint(
        source,
        output,
        vision_tower=vision_tower,
        image_feature_source=split(image_feature_source),
        dtype=torch_dtype(dtype),
        chat_template=chat_template,
        max_shard_size=max_shard_size,
        base=base,
    )
    typer.echo(f"Wrote {output}: {_describe(checkpoint)}.")
    if base is None and hub_id(source):
        typer.echo(
            "To compare it with the original, run the first command in the environment of the original code, and the "
            "second here:"
        )
        for command in verify_commands(source, output, RECORD_SCRIPT):
            typer.echo(f"  {command}")


def export(
    source: Annotated[
        str, typer.Argument(metavar="MODEL", help="Directory or Hub id of a converted or trained model.")
    ],
    output: Output,
    vision_tower: Annotated[
        str | None,
        typer.Option(
            help="Directory or Hub id of a Florence-2 of the same size, for the weights of its decoder, which the "
            "original creates but does not use. By default, the original initializes them at random."
        ),
    ] = None,
    max_shard_size: MaxShardSize = "1GB",
) -> None:
    """Export a model to the original format."""
    from ..conversion import export as export_model

    exported = export_model(source, output, vision_tower=vision_tower, max_shard_size=max_shard_size)
    config = exported.files["config.json"]
    typer.echo(f"Wrote {output}: {config['model_type']}, {len(exported.tensors)} tensors of {config['torch_dtype']}.")


def assemble(
    vision_tower: Annotated[
        str, typer.Option(help="Directory or Hub id of a Florence-2, such as microsoft/Florence-2-large-ft.")
    ],
    llm: Annotated[
        str,
        typer.Option(help="Directory or Hub id of a causal language model, such as microsoft/Phi-3.5-mini-instruct."),
    ],
    output: Annotated[Path, typer.Option(help="Output directory. It must not exist, or be empty.")],
    fusion: Annotated[
        Literal["channel", "token", "average"], typer.Option(help="How features are fused.")
    ] = "channel",
    features: Annotated[
        list[str] | None,
        typer.Option(
            help="Features to fuse, in order: image (without a prompt) and names of prompts, separated by commas. By "
            "default, image and all prompts."
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            metavar='NAME="TEXT"',
            help="Add a prompt to the paper's caption, ocr and grounding, or override one of them. Can be repeated.",
        ),
    ] = None,
    image_feature_source: ImageFeatureSource = None,
    projector_depth: Annotated[int, typer.Option(help="Number of linear layers of the projector.")] = 3,
    dtype: Annotated[DtypeName | None, typer.Option(help="By default, that of the language model.")] = None,
    chat_template: Annotated[
        str,
        typer.Option(
            help="plain (an image and its caption, for pretraining), or llama3, phi3 or vicuna (for conversations)."
        ),
    ] = "plain",
    max_shard_size: MaxShardSize = "1GB",
) -> None:
    """Combine a Florence-2 and a language model with a new projector, for pretraining."""
    from ..conversion import assemble as assemble_model

    prompts = {}
    for given in prompt or []:
        name, separator, text = given.partition("=")
        if not (name.strip() and separator and text.strip()):
            raise typer.BadParameter(f'{given!r} is not NAME="TEXT".', param_hint="--prompt")
        prompts[name.strip()] = text.strip()
    checkpoint = assemble_model(
        vision_tower,
        llm,
        output,
        fusion_strategy=fusion,
        fusion_features=split(features),
        prompts=prompts,
        image_feature_source=split(image_feature_source),
        projector_depth=projector_depth,
        dtype=torch_dtype(dtype),
        chat_template=chat_template,
        max_shard_size=max_shard_size,
    )
    config = checkpoint.config
    typer.echo(
        f"Wrote {output}: {_describe(checkpoint)}, {config.fusion_strategy} fusion of "
        f"{', '.join(config.fusion_features or [])}; the projector is new."
    )


def verify(
    model: Model,
    reference: Annotated[
        Path, typer.Option(help="Recorded outputs of the original: a file that record_reference.py wrote.")
    ],
    tolerance_factor: Annotated[float, typer.Option(help="Factor of all tolerances.", min=0.0)] = 1.0,
    dtype: Annotated[DtypeName, typer.Option(help="Dtype to compute in. The tolerances are for float32.")] = "float32",
    device: Device = "auto",
) -> None:
    """Compare a model with recorded outputs of the original. The exit code is 1 if a check fails."""
    from ..conversion import load_pretrained, verification

    network, processor = load_pretrained(model, dtype=torch_dtype(dtype), device_map=device)
    results = verification.verify(network, processor, reference, tolerance_factor)
    typer.echo(verification.format_results(results))
    if not verification.agrees(results):
        raise typer.Exit(1)


def _describe(checkpoint: "ConvertedCheckpoint") -> str:
    config = checkpoint.config
    return (
        f"{config.text_config.model_type}, {checkpoint.num_parameters / 1e6:,.1f} million parameters, "
        f"{config.num_image_tokens} tokens per image of {config.image_size} x {config.image_size}"
    )
