# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `florence-vl`. Commands import what they need when they run: torch alone takes seconds."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer


if TYPE_CHECKING:
    import torch


app = typer.Typer(
    name="florence-vl",
    help="Florence-VL, native to Hugging Face Transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# Options that several commands share.
ImageFeatureSource = Annotated[
    list[str] | None,
    typer.Option(
        help="How the image becomes tokens, instead of what the tower's config.json says: one or more of "
        "spatial_avg_pool, temporal_avg_pool, last_frame, separated by commas."
    ),
]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting instead of the recipe's. May be given several times."),
]
MaxShardSize = Annotated[str, typer.Option(help="Size of a file of weights at most.")]


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
    image_feature_source: ImageFeatureSource = None,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32. By default, as in the checkpoint.")
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="llama3, phi3, vicuna or plain. By default, the one that fits the checkpoint.")
    ] = None,
    max_shard_size: MaxShardSize = "1GB",
    base: Annotated[
        str | None,
        typer.Option(help="Where SOURCE holds a projector or LoRA alone: the model that it is put onto."),
    ] = None,
) -> None:
    """Convert an original checkpoint into a folder that Transformers loads."""
    from .conversion import convert as convert_checkpoint
    from .conversion.model_card import hub_id_of, verify_commands

    plan = convert_checkpoint(
        source,
        output,
        vision_tower=vision_tower,
        image_feature_source=_split(image_feature_source),
        dtype=_dtype(dtype),
        chat_template=chat_template,
        max_shard_size=max_shard_size,
        base=base,
    )
    typer.echo(
        f"Wrote {output}: {plan.config.text_config.model_type}, {plan.num_parameters / 1e6:,.1f} million parameters, "
        f"{plan.config.num_image_tokens} tokens per image of {plan.config.image_size} x {plan.config.image_size}."
    )
    if base is None and hub_id_of(source):
        typer.echo("To compare it with the original code, run the first line where that code is, the second here:")
        for command in verify_commands(source, output):
            typer.echo(f"  {command}")


@app.command()
def export(
    source: Annotated[str, typer.Argument(help="Folder or Hub id of a converted or trained model.", metavar="DIR")],
    output: Annotated[
        Path, typer.Argument(help="Folder to make. It appears when it is complete.", metavar="ORIGINAL_DIR")
    ],
    vision_tower: Annotated[
        str | None,
        typer.Option(
            metavar="DIR_OR_ID",
            help="A Florence-2 of the same size, for the tensors of its decoder, which the original builds and does "
            "not use. Without, it starts them at random.",
        ),
    ] = None,
    max_shard_size: MaxShardSize = "1GB",
) -> None:
    """Turn a model back into a checkpoint that the original code loads."""
    from .conversion import export as export_model

    plan = export_model(source, output, vision_tower=vision_tower, max_shard_size=max_shard_size)
    original = plan.files["config.json"]
    typer.echo(f"Wrote {output}: {original['model_type']}, {len(plan.tensors)} tensors of {original['torch_dtype']}.")


@app.command()
def assemble(
    vision_tower: Annotated[
        str,
        typer.Option(
            help="Folder or Hub id of a Florence-2, such as microsoft/Florence-2-large-ft or "
            "florence-community/Florence-2-large-ft."
        ),
    ],
    llm: Annotated[
        str,
        typer.Option(help="Folder or Hub id of a causal language model, such as microsoft/Phi-3.5-mini-instruct."),
    ],
    output: Annotated[Path, typer.Option(help="Folder to make. It appears when it is complete.")],
    fusion: Annotated[
        Literal["channel", "token", "average"], typer.Option(help="How features are joined.")
    ] = "channel",
    features: Annotated[
        list[str] | None,
        typer.Option(
            help="What is joined, in order: image (what the tower sees before any prompt) and names of prompts, "
            "separated by commas. By default, image and all prompts."
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            metavar='NAME="TEXT"',
            help="A prompt that the tower reads pictures under, beside the paper's caption, ocr and grounding or, "
            "under one of their names, instead of it. May be given several times.",
        ),
    ] = None,
    image_feature_source: ImageFeatureSource = None,
    projector_depth: Annotated[int, typer.Option(help="Number of linear layers of the projector.")] = 3,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32. By default, the language model's.")
    ] = None,
    chat_template: Annotated[
        str,
        typer.Option(
            help="plain, a picture and its caption, which the paper pretrains with; or llama3, phi3 or vicuna, for "
            "conversations."
        ),
    ] = "plain",
    max_shard_size: MaxShardSize = "1GB",
) -> None:
    """Put a Florence-2 and a language model together, with a new projector, ready for pretraining."""
    from .conversion import assemble as assemble_model

    prompts = {}
    for given in prompt or []:
        name, separator, text = given.partition("=")
        if not (name.strip() and separator and text.strip()):
            raise typer.BadParameter(f'{given!r} is not NAME="TEXT".', param_hint="--prompt")
        prompts[name.strip()] = text.strip()
    plan = assemble_model(
        vision_tower,
        llm,
        output,
        fusion_strategy=fusion,
        fusion_features=_split(features),
        prompts=prompts,
        image_feature_source=_split(image_feature_source),
        projector_depth=projector_depth,
        dtype=_dtype(dtype),
        chat_template=chat_template,
        max_shard_size=max_shard_size,
    )
    typer.echo(
        f"Wrote {output}: {plan.config.text_config.model_type}, {plan.num_parameters / 1e6:,.1f} million parameters, "
        f"{plan.config.num_image_tokens} tokens per image of {plan.config.image_size} x {plan.config.image_size}, "
        f"{plan.config.fusion_strategy} fusion of {', '.join(plan.config.fusion_features)}; the projector is new."
    )


@app.command("check-data")
def check_data(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="Conversations: a .json, .jsonl or .parquet file, a folder of the library datasets, or a Hub id.",
        ),
    ],
    image_folder: Annotated[
        Path | None, typer.Option(help="What paths of pictures are relative to. By default, FILE's folder.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the model to train, to count tokens with.")
    ] = None,
    max_length: Annotated[int, typer.Option(help="What training cuts samples at, in tokens.", min=1)] = 2048,
    chat_template: Annotated[
        str | None, typer.Option(help="llama3, phi3, vicuna or plain. By default, the model's own.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that read. By default, one per core.", min=0)] = None,
    split: Annotated[str, typer.Option(help="Of a dataset that has several.")] = "train",
    show: Annotated[int, typer.Option(help="How many samples are named of each kind of problem.", min=0)] = 5,
    report: Annotated[
        Path | None, typer.Option(help="A .jsonl file to write, with every problem.", metavar="FILE.jsonl")
    ] = None,
) -> None:
    """Read all conversations and pictures once, before training does. The status is 1 if there are problems."""
    from transformers import AutoProcessor

    from .training import check_data as checks
    from .training.conversation_data import load_conversations

    if chat_template is not None and model is None:
        raise typer.BadParameter("It takes the tokenizer of a --model.", param_hint="--chat-template")
    processor = None if model is None else AutoProcessor.from_pretrained(model)
    found = checks.check_data(
        load_conversations(file, image_folder, split),
        processor,
        max_length=max_length,
        chat_template=chat_template,
        num_workers=workers,
        num_examples=show,
        report_file=report,
    )
    typer.echo(checks.format_report(found))
    if not found.is_sound:
        raise typer.Exit(1)


def _list_settings(wanted: bool) -> None:
    if wanted:
        from .training.arguments import describe_settings

        typer.echo(describe_settings())
        raise typer.Exit()


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file of settings, such as those in recipes/.")],
    changes: Changes = None,
    on_error: Annotated[
        Literal["skip", "raise"] | None,
        typer.Option(help="What a broken sample does: it is left out and counted, or it ends the run. As `on_error`."),
    ] = None,
    settings: Annotated[
        bool,
        typer.Option("--settings", callback=_list_settings, is_eager=True, help="List what a recipe may set."),
    ] = False,
) -> None:
    """Train a model as a recipe says, or go on where the run was cut off."""
    # Its callback has done it, before the recipe was asked for.
    del settings
    import logging

    from .training.arguments import read_recipe
    from .training.training_run import train as train_model

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # Every process of a run trains the same: one tells of it.
    if os.environ.get("RANK", "0") == "0":
        logging.getLogger(__package__).setLevel(logging.INFO)
    settled = {} if on_error is None else {"on_error": on_error}
    train_model(read_recipe(recipe, changes) | settled)


@app.command()
def plan_memory(
    recipe: Annotated[
        Path | None, typer.Argument(help="YAML file of settings. Without, a table of the paper's runs and of others.")
    ] = None,
    changes: Changes = None,
    accelerate_config: Annotated[
        Path | None, typer.Option(help="What `accelerate launch` is given, such as those in recipes/accelerate/.")
    ] = None,
    num_gpus: Annotated[int | None, typer.Option(help="GPUs of all machines together.", min=1)] = None,
    sharding: Annotated[
        Literal["none", "ddp", "zero2", "zero3", "fsdp2"] | None,
        typer.Option(help="What the GPUs divide, instead of what the accelerate configuration says."),
    ] = None,
    shape: Annotated[
        Literal["8b", "3b"] | None,
        typer.Option(help="Plan for a published model's shape, not for the recipe's model."),
    ] = None,
    images_per_sample: Annotated[int, typer.Option(help="Pictures in each sample.", min=0)] = 1,
) -> None:
    """Say how much memory training takes per GPU. Only the model's configuration is read."""
    from . import planning
    from .modeling import FlorenceVLConfig
    from .training import read_recipe

    if recipe is None:
        typer.echo(planning.format_table(planning.plan_known_runs()))
        return
    model, config_changes, setup = planning.read_setup(
        read_recipe(recipe, changes), num_gpus, sharding, accelerate_config, images_per_sample
    )
    config = planning.published_config(shape) if shape else FlorenceVLConfig.from_pretrained(model)
    if config_changes:
        config = FlorenceVLConfig.from_dict({**config.to_dict(), **config_changes})
    typer.echo(planning.format_plan(planning.plan_memory(config, setup)))


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


@app.command()
def merge(
    adapter: Annotated[str, typer.Argument(help="Folder or Hub id of a LoRA adapter that peft saved.")],
    output: Annotated[Path, typer.Argument(help="Folder to make. It appears when it is complete.")],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Folder or Hub id of the model below the adapter, not quantized. By default, the one that the "
            "adapter names.",
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32. By default, as the base is stored.")
    ] = None,
    max_shard_size: MaxShardSize = "1GB",
) -> None:
    """Make an adapter part of its base: a model that loads without peft."""
    from .training.adapters import merge_adapter

    model = merge_adapter(adapter, output, base=base, dtype=_dtype(dtype), max_shard_size=max_shard_size)
    num_parameters = model.num_parameters() / 1e6
    typer.echo(f"Wrote {output}: {model.config.text_config.model_type}, {num_parameters:,.1f} million parameters.")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a converted or trained model.", metavar="DIR")],
    repository: Annotated[str, typer.Argument(help="Where to, as user/name. It is made if there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Only its owner sees the repository.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and list the files, but send nothing.")] = False,
) -> None:
    """Upload a model to the Hub, if it is complete. Only files that belong to it are sent."""
    from .conversion.hub import push as push_model

    files = push_model(folder, repository, private=private, dry_run=dry_run)
    for name, size in files.items():
        typer.echo(f"{size:>15,}  {name}")
    total = f"{len(files)} files, {sum(files.values()):,} bytes"
    if dry_run:
        typer.echo(f"{total} would go to {repository}. Nothing was sent.")
    else:
        typer.echo(f"{total} are at https://huggingface.co/{repository}.")


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a converted model.", metavar="DIR")],
    reference: Annotated[
        Path, typer.Option(help="What the original computed, a file that tools/record_reference.py wrote.")
    ],
    tolerance_factor: Annotated[float, typer.Option(help="Multiplies what stages may differ by.", min=0.0)] = 1.0,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="To compute in. The tolerances are float32's.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="Where the model runs, such as cpu, cuda or auto.")] = "auto",
) -> None:
    """Compare a model with what the original computed, stage by stage. The status is 1 if a stage differs."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from .conversion import verification

    processor = AutoProcessor.from_pretrained(model)
    network = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype, device_map=device)
    results = verification.verify(network, processor, reference, tolerance_factor)
    typer.echo(verification.format_results(results))
    if not verification.agrees(results):
        raise typer.Exit(1)


def _split(values: list[str] | None) -> list[str] | None:
    """The values of an option that may be given several times, or once with commas."""
    return [value for given in values or [] for value in given.replace(",", " ").split()] or None


def _dtype(name: str | None) -> "torch.dtype | None":
    import torch

    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name is not None and name not in dtypes:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(dtypes)}.", param_hint="--dtype")
    return dtypes.get(name)


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
