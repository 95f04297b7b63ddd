# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `florence-vl`. Commands import what they need when they run: torch alone takes seconds."""

import sys
from pathlib import Path
from typing import Annotated

import typer


app = typer.Typer(
    name="florence-vl",
    help="Florence-VL, native to Hugging Face Transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _options(
    traceback: Annotated[bool, typer.Option("--traceback", help="On an error, show where it happened.")] = False,
) -> None:
    # `main` looks for the flag by itself, since an error may come before or after this runs.
    del traceback


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Folder or Hub id of an original Florence-VL checkpoint.")],
    output: Annotated[Path, typer.Argument(help="Folder to make. It appears when it is complete.")],
    vision_tower: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the checkpoint's Florence-2, where SOURCE has none.")
    ] = None,
    image_feature_source: Annotated[
        list[str] | None,
        typer.Option(
            help="How the image becomes tokens, instead of what the tower's config.json says: one or more of "
            "spatial_avg_pool, temporal_avg_pool, last_frame, separated by commas."
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32. By default, as in the checkpoint.")
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="llama3, phi3, vicuna or plain. By default, the one that fits the checkpoint.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Size of a file of weights at most.")] = "5GB",
) -> None:
    """Convert an original checkpoint into a folder that Transformers loads."""
    import torch

    from .conversion import convert as convert_checkpoint

    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if dtype is not None and dtype not in dtypes:
        raise typer.BadParameter(f"{dtype!r} is not one of {', '.join(dtypes)}.", param_hint="--dtype")
    sources = [source for sources in image_feature_source or [] for source in sources.replace(",", " ").split()]
    plan = convert_checkpoint(
        source,
        output,
        vision_tower=vision_tower,
        image_feature_source=sources or None,
        dtype=dtypes.get(dtype),
        chat_template=chat_template,
        max_shard_size=max_shard_size,
    )
    num_parameters = sum(torch.Size(tensor.shape).numel() for tensor in plan.tensors.values())
    typer.echo(
        f"Wrote {output}: {plan.config.text_config.model_type}, {num_parameters / 1e6:,.1f} million parameters, "
        f"{plan.config.num_image_tokens} tokens per image of {plan.config.image_size} x {plan.config.image_size}."
    )


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a converted or trained model.")],
    images: Annotated[list[Path] | None, typer.Argument(help="Pictures to talk about.", metavar="IMAGE...")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of an answer at most, in tokens.")] = 512,
    device: Annotated[str, typer.Option(help="Where the model runs, such as cpu, cuda or auto.")] = "auto",
) -> None:
    """Talk about pictures. An empty line, /exit or the end of the input ends the conversation."""
    from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig, TextStreamer

    from .chat import ChatSession

    for image in images or []:
        if not image.is_file():
            raise typer.BadParameter(f"There is no picture {image}.", param_hint="IMAGE...")
    processor = AutoProcessor.from_pretrained(model)
    network = AutoModelForImageTextToText.from_pretrained(model, dtype="auto", device_map=device).eval()
    session = ChatSession(network, processor, [str(image) for image in images or []])
    generation_config = GenerationConfig.from_dict(network.generation_config.to_dict())
    generation_config.max_new_tokens = max_new_tokens
    generation_config.max_length = None
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    while question := _ask():
        session.answer(question, streamer, generation_config)


def _ask() -> str:
    """The user's next line; empty at the end of the conversation."""
    typer.echo("> ", nl=False)
    question = sys.stdin.readline().strip()
    if not sys.stdin.isatty():
        typer.echo(question)
    return "" if question == "/exit" else question


def main(arguments: list[str] | None = None) -> None:
    """Run the command: an error is one readable line, and a status that is not 0."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        app(args=arguments, prog_name="florence-vl")
    except Exception as error:
        if "--traceback" in arguments:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        typer.echo(f"florence-vl: error: {message}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()


__all__ = ["app", "main"]
