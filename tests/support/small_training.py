"""Small runs of the reference trainer: noisy stripes to learn from, a tiny model, and its script as a user starts it."""

import numpy as np
import train
from PIL import Image
from trainer.data.sources import read_data
from trainer.run import run as run_settings
from trainer.settings import Settings

TINY = ["--model", "test_efficientnet", "--no-pretrained", "--image-size", "32"]


def draw_stripes(root):
    """Stripes across and stripes down: 20 noisy images of each, of different thickness."""
    rng = np.random.default_rng(0)
    for i in range(20):
        wave = 127 + 90 * np.sin(np.arange(32) / rng.uniform(0.6, 1.2))
        stripes = np.clip(wave[:, None] + rng.normal(0, 15, (32, 32)), 0, 255).astype(np.uint8)
        for name, image in (("across", stripes), ("down", stripes.T)):
            (root / name).mkdir(exist_ok=True)
            Image.fromarray(image).save(root / name / f"{i}.png")
    return root


def flags(folder, output, *more):
    return [*TINY, "--data", str(folder), "--output", str(output), "--epochs", "2", "--no-figures", *more]


def parsed(*given):
    return train.parse([str(flag) for flag in given])


def run(*given):
    return run_settings(parsed(*given))


def messages(capsys, *given):
    assert train.main([str(flag) for flag in given]) == 2
    return capsys.readouterr().err


def checked(**values):
    """Settings with their defaults filled in."""
    return Settings(**values).checked()


def read(data, size=16, **more):
    """Images of a folder or table, at a small size."""
    return read_data(checked(data=str(data), image_size=size, **more))
