"""Small runs of the text-to-image example: noisy spots with texts, a small pipeline, and the script as a user starts it."""

import json

import numpy as np
import text_to_image
from datasets import Dataset, Features, Image, Value
from diffusion.pipelines import generate
from diffusion.settings import Settings, read_command
from diffusion.tiny import build_tiny
from PIL.Image import fromarray

SIDE = 16
TEXTS = {"light": "a light spot", "dark": "a dark spot"}


def draw_spots(root):
    """Sixteen noisy spots, light and dark, with their texts in a table."""
    rng, lines = np.random.default_rng(0), []
    for i in range(16):
        name = "light" if i % 2 else "dark"
        image = rng.normal(110, 10, (SIDE, SIDE))
        image[4:12, 4:12] += 90 if i % 2 else -90
        fromarray(image.clip(0, 255).astype(np.uint8)).save(root / f"{i}.png")
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
    small = ["--batch_size", "4", "--inference_steps", "2", "--sample_every", "100", "--save_every", "2"]
    return ["--data", data, "--pipeline", folder, "--output", output, *small, *more]


def settings(*given):
    return read_command(Settings, None, [str(flag) for flag in given])


def run(*given):
    return text_to_image.run(settings(*given))


def messages(capsys, *given):
    assert text_to_image.main([str(flag) for flag in given]) == 2
    return capsys.readouterr().err


def images_of(pipeline, **options):
    return generate(pipeline, list(TEXTS.values()), seed=0, size=SIDE, steps=2, **options)


def captioned(texts, seed=0):
    """Random images, each of a patient and with its text as label."""
    rng = np.random.default_rng(seed)
    rows = {"text": list(texts), "label": list(texts), "patient": [str(i) for i in range(len(texts))]}
    rows["image"] = list(rng.integers(0, 256, (len(texts), SIDE, SIDE, 3)).astype(np.uint8))
    features = {**dict.fromkeys(("text", "label", "patient"), Value("string")), "image": Image()}
    return Dataset.from_dict(rows, Features(features))
