"""Adapters of several sites on one tiny base, and banks of them."""

import functools
import io

import torch
from checkpoints import trained
from golden.model import Golden

import medpeft


def sites(method, seed, *, classes=3, **options):
    """A copy of the base as one site has trained it, with as many classes."""
    model = Golden()
    if classes != 3:
        other = Golden(classes=classes)
        model.head = other.head
    return trained(model, method, seed=seed, **options)


def file_of(model, **metadata):
    file = io.BytesIO()
    medpeft.save(model, file, metadata or None)
    return file


def bank_of(made, plain=None):
    """A bank of the adapters of trained models, by name."""
    bank = medpeft.Bank(Golden().eval() if plain is None else plain)
    for name, model in made.items():
        bank.add(name, file_of(model))
    return bank


def images(count, seed=0):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


@functools.cache
def several(count=3):
    """Models that nobody changes."""
    made = {}
    for seed in range(count):
        made[f"lora {seed}"] = sites("lora", seed, rank=2, classes=3 + seed % 2)
        made[f"ssf {seed}"] = sites("ssf", seed)
        made[f"bias {seed}"] = sites("bias", seed)
    return made
