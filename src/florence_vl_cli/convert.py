# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Commands of `conversion`."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Argument, Option

from . import options


def convert(
    source: Annotated[str, Argument(help="Directory or Hub id of an original Florence-VL checkpoint.")],
    output: options.Output,
    vision_tower: Annotated[str | None, Option(help="Directory or Hub id of a Florence-2 that SOURCE lacks.")] = None,
    image_feature_source: options.FeatureSource = None,
    dtype: options.Dtype = None,
    chat_template: options.ChatTemplate = None,
    max_shard_size: options.ShardSize = "1GB",
    base: Annotated[str | None, Option(help="Base model (directory or Hub id) of a projector or LoRA.")] = None,
) -> None:
    """Convert an original checkpoint to a model for Transformers."""
    from florence_vl_hf.conversion import convert as convert_checkpoint
    from florence_vl_hf.conversion.reference import RECORD_SCRIPT

    checkpoint = convert_checkpoint(
        source,
        output,
        vision_tower=vision_tower,
        image_feature_source=image_feature_source,
        dtype=options.torch_dtype(dtype),
        chat_template=chat_template,
        max_shard_size=max_shard_size,
        base=base,
    )
    options.echo_written(output, checkpoint.config, checkpoint.num_parameters)
    if base is None:
        typer.echo(
            "To compare it with the original, run the first command in the environment of the original code, and the "
            "second here:\n"
            f"  python {RECORD_SCRIPT} --checkpoint {source} --images IMAGES --output reference.safetensors\n"
            f"  florence-vl verify {output} --reference reference.safetensors"
        )


def export(
    model: Annotated[str, Argument(help="Directory or Hub id of a converted or trained model.")],
    output: options.Output,
    vision_tower: Annotated[
        str | None,
        Option(
            help="Directory or Hub id of a Florence-2, for its decoder, which the original creates but does not run."
        ),
    ] = None,
    max_shard_size: options.ShardSize = "1GB",
) -> None:
    """Export a model to the original format."""
    from florence_vl_hf.conversion import export as export_model

    exported = export_model(model, output, vision_tower=vision_tower, max_shard_size=max_shard_size)
    config = exported.files["config.json"]
    typer.echo(f"Wrote {output}: {config['model_type']}, {len(exported.tensors)} tensors of {config['torch_dtype']}.")


def assemble(
    vision_tower: Annotated[str, Option(help="Directory or Hub id, such as microsoft/Florence-2-large-ft.")],
    llm: Annotated[str, Option(help="Directory or Hub id, such as microsoft/Phi-3.5-mini-instruct.")],
    output: Annotated[Path, Option(help="Output directory. It must not exist, or be empty.")],
    fusion: Annotated[Literal["channel", "token", "average"], Option(help="How features are fused.")] = "channel",
    features: Annotated[
        list[str] | None,
        Option(
            callback=options.split, help="Features in order, like image,caption. By default, image and all prompts."
        ),
    ] = None,
    prompt: options.Prompt = None,
    image_feature_source: options.FeatureSource = None,
    projector_depth: Annotated[int, Option(help="Number of linear layers of the projector.", min=1, max=99)] = 3,
    dtype: options.Dtype = None,
    chat_template: Annotated[str, Option(help="plain for captions; llama3, phi3 or vicuna for chats.")] = "plain",
    max_shard_size: options.ShardSize = "1GB",
) -> None:
    """Combine a Florence-2 and a language model with a new projector, for pretraining."""
    from florence_vl_hf.conversion import assemble as assemble_model

    checkpoint = assemble_model(
        vision_tower,
        llm,
        output,
        fusion_strategy=fusion,
        fusion_features=features,
        prompts=options.parse_prompts(prompt),
        image_feature_source=image_feature_source,
        projector_depth=projector_depth,
        dtype=options.torch_dtype(dtype),
        chat_template=chat_template,
        max_shard_size=max_shard_size,
    )
    options.echo_written(output, checkpoint.config, checkpoint.num_parameters)


def verify(
    model: options.Model,
    reference: Annotated[Path, Option(help="Outputs of the original, as record_reference.py writes them.")],
    tolerance_factor: Annotated[float, Option(help="Factor of the tolerances, which are for float32.", min=0.0)] = 1.0,
    dtype: options.Dtype = "float32",
    device: options.Device = "auto",
) -> None:
    """Compare a model with recorded outputs of the original. The exit code is 1 if a check fails."""
    from florence_vl_hf.conversion import load_pretrained, verification

    network, processor = load_pretrained(model, dtype=dtype, device_map=device)
    results = verification.verify(network, processor, reference, tolerance_factor)
    typer.echo(verification.format_results(results))
    if not verification.agrees(results):
        raise typer.Exit(1)
