"""Small runs of the text-to-image example: noisy spots with texts, a small pipeline, and the script as a user starts it."""

import json

import numpy as np
import text_to_image
import torch
from diffusion.captions import Captioned
from diffusion.flags import make_parser, parse
from diffusion.pipelines import generate
from diffusion.tiny import build_tiny
from PIL import Image

SIDE = 16
TEXTS = {"light": "a light spot", "dark": "a dark spot"}


def draw_spots(root):
    """Sixteen noisy spots, light and dark, with their texts in a table."""
    rng, lines = np.random.default_rng(0), []
    for i in range(16):
        name = "light" if i % 2 else "dark"
        image = rng.normal(110, 10, (SIDE, SIDE))
        image[4:12, 4:12] += 90 if i % 2 else -90
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": TEXTS[name], "label": name}))
    (root / "metadata.jsonl").write_text("\n".join(lines))
    return root


def save_pipeline(folder):
    """A tiny pipeline with a yet smaller UNet, both as they are drawn; no test changes it."""
    from diffusers import UNet2DConditionModel

    pipeline = build_tiny(TEXTS.values(), SIDE, seed=0)
    pipeline.unet = UNet2DConditionModel.from_config(pipeline.unet.config, block_out_channels=(16, 32))
    pipeline.save_pretrained(folder)
    return folder


def flags(data, folder, output, *more):
    small = ["--batch-size", "4", "--inference-steps", "2", "--sample-every", "100", "--save-every", "2"]
    return ["--data", data, "--pipeline", folder, "--output", output, *small, *more]


def run(*given):
    return text_to_image.run(parse(make_parser(""), [str(flag) for flag in given]))


def messages(capsys, *given):
    assert text_to_image.main([str(flag) for flag in given]) == 2
    return capsys.readouterr().err


def images_of(pipeline, **options):
    return generate(pipeline, list(TEXTS.values()), seed=0, size=SIDE, steps=2, **options)


def captioned(texts, seed=0):
    pixels = torch.randint(
        0, 256, (len(texts), 3, SIDE, SIDE), generator=torch.Generator().manual_seed(seed)
    ).to(torch.uint8)
    return Captioned(pixels, list(texts), list(texts), np.arange(len(texts)), SIDE)
