"""Counts of Stable Diffusion 1.x are the paper's, and those of its published configuration by hand."""

import copy
from collections import namedtuple
from functools import cache

import pytest
import torch
from denoisers import BLOCK, STRATEGIES
from torch import nn

import medpeft

Weight = namedtuple("Weight", "role outputs fan_in bias block")


def resnet(inputs, outputs):
    yield Weight("norm", inputs, 1, True, False)
    yield Weight("conv", outputs, 9 * inputs, True, False)
    yield Weight("linear", outputs, 1280, True, False)  # the time embedding
    yield Weight("norm", outputs, 1, True, False)
    yield Weight("conv", outputs, 9 * outputs, True, False)
    if inputs != outputs:
        yield Weight("conv", outputs, inputs, True, False)


def attentions(width):
    yield Weight("norm", width, 1, True, True)
    yield Weight("conv", width, width, True, True)
    for text in (width, 768):  # self-attention, then attention to the text
        yield Weight("norm", width, 1, True, True)
        yield Weight("q", width, width, False, True)
        yield Weight("k", width, text, False, True)
        yield Weight("v", width, text, False, True)
        yield Weight("o", width, width, True, True)
    yield Weight("norm", width, 1, True, True)
    yield Weight("linear", 8 * width, width, True, True)  # GEGLU
    yield Weight("linear", width, 4 * width, True, True)
    yield Weight("conv", width, width, True, True)


def weights_of_stable_diffusion():
    """Every weight of the UNet: 4 latent channels, widths 320 to 1280, two residual blocks at each of four resolutions."""
    widths, now, skips = (320, 640, 1280, 1280), 320, [320]
    yield Weight("conv", 320, 9 * 4, True, False)
    yield Weight("linear", 1280, 320, True, False)
    yield Weight("linear", 1280, 1280, True, False)
    for i, width in enumerate(widths):
        for _ in range(2):
            yield from resnet(now, width)
            if i < 3:
                yield from attentions(width)
            now = width
            skips.append(now)
        if i < 3:
            yield Weight("conv", width, 9 * width, True, False)
            skips.append(width)
    yield from (*resnet(1280, 1280), *attentions(1280), *resnet(1280, 1280))
    for i, width in enumerate(reversed(widths)):
        for _ in range(3):
            yield from resnet(now + skips.pop(), width)
            if i > 0:
                yield from attentions(width)
            now = width
        if i < 3:
            yield Weight("conv", width, 9 * width, True, False)
    assert not skips
    yield Weight("norm", 320, 1, True, False)
    yield Weight("conv", 4, 9 * 320, True, False)


def total(chosen=lambda w: True, size=lambda w: w.outputs * w.fan_in + w.outputs * w.bias):
    return sum(size(w) for w in weights_of_stable_diffusion() if chosen(w))


def is_norm(w):
    return w.role == "norm"


def biases(w):
    return w.outputs * w.bias


def rest(w):
    """Of a layer outside the attention blocks: its bias, and all of a norm."""
    return w.outputs * (w.bias + is_norm(w))


COUNTS = [
    ("full", "full", {}, 859_520_964, total()),
    ("attention", BLOCK, {}, 267_239_360, total(lambda w: w.block)),
    ("attention layers alone", "attention", {}, 93_536_640, total(lambda w: w.role in "qkvo")),
    ("bias", "bias", {}, 343_684, total(size=biases)),
    ("norm", "norm", {}, 200_320, total(is_norm)),
    ("bias+norm", "bias+norm", {}, 443_844, total(size=rest)),
    (
        "bias+norm+attention",
        STRATEGIES["bias+norm+attention"],
        {},
        267_421_124,
        total(lambda w: w.block) + total(lambda w: not w.block, rest),
    ),
    ("lora", "lora", {}, 797_184, total(lambda w: w.role in "qv", lambda w: 8 * (w.outputs + w.fan_in))),
    (
        "lora as in diffusers",
        "lora",
        {"rank": 4, "parts": "qkvo"},
        797_184,
        total(lambda w: w.role in "qkvo", lambda w: 4 * (w.outputs + w.fan_in)),
    ),
    ("svdiff", "svdiff", {}, 222_696, total(lambda w: not is_norm(w), lambda w: min(w.outputs, w.fan_in))),
    ("svdiff with norms", "svdiff", {"norms": True}, 222_805, total(size=lambda w: min(w.outputs, w.fan_in))),
]


@cache
def _stable_diffusion_on_meta():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(cross_attention_dim=768)


@pytest.mark.parametrize(
    ("method", "options", "count", "by_hand"), [row[1:] for row in COUNTS], ids=[row[0] for row in COUNTS]
)
def test_counts_of_stable_diffusion(method, options, count, by_hand):
    planned = medpeft.plan(_stable_diffusion_on_meta(), method, head=None, **options)

    assert planned.trainable == count == by_hand


def test_the_weights_written_by_hand_are_those_of_the_model():
    layers = (
        m
        for m in _stable_diffusion_on_meta().modules()
        if isinstance(getattr(m, "weight", None), nn.Parameter)
    )
    found = sorted((len(m.weight), m.weight[0].numel(), m.bias is not None) for m in layers)

    assert found == sorted((w.outputs, w.fan_in, w.bias) for w in weights_of_stable_diffusion())


@pytest.mark.parametrize("method", ["lora", "svdiff"])
def test_applying_on_the_meta_device_trains_what_was_planned(method):
    model = copy.deepcopy(_stable_diffusion_on_meta())
    medpeft.apply(model, method, head=None)

    assert medpeft.report(model).trainable == {"lora": 797_184, "svdiff": 222_696}[method]
