"""What a site does with its images: train for a round, and predict."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from trainer.data.augmentation import augmentation
from trainer.data.batches import Preprocessing
from trainer.judging.scores import score
from trainer.networks.model import adapted_model, input_statistics

import medpeft

from .settings import Settings
from .sites import Site

CHUNK = 64  # images that are predicted at once


def make_model(settings: Settings, classes: list[str]) -> nn.Module:
    """Build the adapted model, alike at every site: base, head and adapters follow from the settings."""
    torch.manual_seed(settings.seed)  # The head is drawn from it.
    model = adapted_model(settings.training(), len(classes))
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def train_round(model: nn.Module, site: Site, settings: Settings, number: int) -> float:
    """Train for the epochs of a round, the first of which is 1; give the mean loss.

    The optimizer begins anew in every round: what it remembers belongs to values that are no more.
    """
    pixels, labels = site.training()
    device = next(model.parameters()).device
    inputs = preprocessing(model, settings)
    vary = augmentation(settings.augment, (settings.image_size, settings.image_size))
    torch.manual_seed(1000 * settings.seed + number)
    rate = settings.training().lr
    assert rate is not None  # It is filled in.
    rate *= (1 + math.cos(math.pi * (number - 1) / settings.rounds)) / 2
    groups = medpeft.parameter_groups(model, lr=rate, weight_decay=settings.weight_decay)
    optimizer = torch.optim.AdamW(groups)
    model.train()
    losses = []
    for _ in range(settings.epochs):
        for rows in torch.randperm(len(labels)).split(settings.batch_size):
            if len(rows) == 1 and len(labels) > 1:
                continue  # BatchNorm that adapts cannot take statistics from one image.
            batch = inputs(torch.stack([vary(image) for image in pixels[rows]]))
            loss = cross_entropy(model(batch.to(device)), labels[rows].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return sum(losses) / len(losses)


@torch.no_grad()
def predict(model: nn.Module, pixels: Tensor, settings: Settings) -> Tensor:
    """Give the probabilities (N, classes) of images (N, 3, S, S)."""
    model.eval()
    device = next(model.parameters()).device
    inputs = preprocessing(model, settings)
    outputs = [model(inputs(part).to(device)).softmax(-1).cpu() for part in pixels.split(CHUNK)]
    return torch.cat(outputs)


def scores(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """Give macro-F1 and the AUROC of each class against the rest, NaN where a class is missing."""
    found = score(probabilities, labels)
    return {"macro_f1": found["macro_f1"], "auroc": found["auroc"]}


def preprocessing(model: nn.Module, settings: Settings) -> Preprocessing:
    """Give what makes stored pixels the model's input."""
    mean, std = input_statistics(model)
    size = settings.image_size
    return Preprocessing((size, size), size, mean, std)


def save(model: nn.Module, path: Path, classes: list[str], settings: Settings) -> None:
    """Write an adapter as predict.py reads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {
        "task": "classify",
        "model": settings.model,
        "pretrained": not settings.no_pretrained,
        "seed": settings.seed,
        "classes": classes,
        "preprocessing": preprocessing(model, settings).to_metadata(),
        "temperature": 1.0,
    }
    medpeft.save(model, path, metadata)
