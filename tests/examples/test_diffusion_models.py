"""Denoisers of diffusers take each of the paper's seven text-to-image strategies."""

import copy
import re

import pytest
import torch
from denoisers import MODELS, STRATEGIES, make, output
from models import randomise_adapters

import medpeft


def close(a, b):
    return torch.allclose(a, b, rtol=0, atol=1e-12 * float(b.abs().max()))


# SD3 computes the text stream's queries in its last block too, and throws away what they give.
DISCARDED = re.compile(r"transformer_blocks\.1\.attn\.(add_q_proj|norm_added_q)$")
WITHOUT_NORMS = ("dit", "pixart")
CASES = [(name, s) for name in MODELS for s in STRATEGIES if not ("norm" in s and name in WITHOUT_NORMS)]
# Every strategy on the paper's kind of UNet, and on the others those that touch a kind of layer of their own.
ELSEWHERE = ("lora", "svdiff", "bias+norm+attention")
WHOLE = [
    (n, s)
    for n, s in CASES
    if n == "stable_diffusion" or s in ELSEWHERE or (s == "attention" and n in WITHOUT_NORMS)
]


@pytest.mark.parametrize(("name", "strategy"), CASES)
def test_a_plan_counts_what_apply_trains(name, strategy):
    model, _ = make(name)
    planned = medpeft.plan(model, STRATEGIES[strategy], head=None).trainable

    medpeft.apply(model, STRATEGIES[strategy], head=None)

    assert planned == sum(p.numel() for p in model.parameters() if p.requires_grad) > 0


@pytest.mark.parametrize(("name", "strategy"), WHOLE)
def test_a_strategy_passes_check_save_load_and_merge(name, strategy, tmp_path):
    base, inputs = make(name)
    model = copy.deepcopy(base)
    exclude = DISCARDED if name == "sd3" else None
    medpeft.apply(model, STRATEGIES[strategy], head=None, exclude=exclude)
    before = output(base, inputs)
    assert close(output(model, inputs), before)

    assert medpeft.check(model, inputs).tensors > 0
    _move(model)
    adapted = output(model, inputs)
    assert not torch.allclose(adapted, before, rtol=1e-3)

    medpeft.save(model, tmp_path / "adapter.safetensors")
    loaded = medpeft.load(copy.deepcopy(base), tmp_path / "adapter.safetensors").eval()
    assert close(output(loaded, inputs), adapted)

    medpeft.merge(model)
    assert close(output(model, inputs), adapted)
    assert model.state_dict().keys() == base.state_dict().keys()


@torch.no_grad()
def _move(model):
    """Change everything that trains, the layers' own parameters a little less than randomise_adapters does its own."""
    randomise_adapters(model)
    generator = torch.Generator().manual_seed(4)
    for name, p in model.named_parameters():
        if p.requires_grad and ".adapters." not in name:
            p.add_(0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype))


@pytest.mark.parametrize("strategy", ["lora", "svdiff", "full"])
def test_the_discarded_queries_of_sd3_are_found(strategy):
    model, inputs = make("sd3")
    medpeft.apply(model, strategy, head=None)

    with pytest.raises(medpeft.MedpeftError, match=r"transformer_blocks\.1\.attn\.add_q_proj"):
        medpeft.check(model, inputs)


@pytest.mark.parametrize("name", WITHOUT_NORMS)
def test_a_transformer_whose_norms_have_no_parameters_says_so(name):
    model, _ = make(name)

    with pytest.raises(medpeft.MedpeftError, match="normalisation layers that have parameters"):
        medpeft.apply(model, "norm", head=None)
