# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Show what the vision tower computes from an image under each prompt: `python features.py MODEL IMAGE`."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image

from florence_vl_hf.analysis import feature_maps
from florence_vl_hf.conversion import load_pretrained
from florence_vl_hf.serving import load_image


MAP_SIZE = 384  # in pixels


def main(
    model: Annotated[str, typer.Argument(help="Directory or Hub id, such as jiuhai/florence-vl-8b-sft.")],
    image: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    output: Annotated[Path, typer.Option(help="The maps, as a .png file.")] = Path("features.png"),
) -> None:
    network, processor = load_pretrained(model, dtype="auto", device_map="auto")
    pixel_values = processor.image_processor(load_image(str(image)), return_tensors="pt").pixel_values
    with torch.inference_mode():
        outputs = network.eval().get_image_features(pixel_values.to(network.device, network.dtype))

    # V, from DaViT, is "image". The others are V't: what BART makes of V under each prompt.
    for name, feature in outputs.features.items():  # (1, num_feature_tokens, hidden_size)
        similarity = torch.cosine_similarity(feature.float(), outputs.features["image"].float(), dim=-1).mean()
        typer.echo(f"{name:<12} {tuple(feature.shape)}, cosine similarity to V: {similarity:.3f}")
    typer.echo(f"fused        {tuple(outputs.last_hidden_state.shape)}")
    typer.echo(f"projected    {tuple(outputs.pooler_output[0].shape)}, one per image, for the language model")

    # The first three principal components of each position as red, green and blue.
    maps = torch.cat(list(feature_maps(outputs.features, network.config).values()), dim=1)  # side by side
    painted = Image.fromarray((255 * maps).byte().numpy())
    painted.resize((MAP_SIZE * len(outputs.features), MAP_SIZE), Image.Resampling.NEAREST).save(output)
    typer.echo(f"Wrote {output}: {', '.join(outputs.features)}, from left to right.")


if __name__ == "__main__":
    typer.run(main)
