"""LoHa, LoKr, LoRA and DoRA against LyCORIS in float64: what they compute, and what a step of SGD makes of it."""

import copy

import pytest
import torch
from layer_oracles import drawn
from models import randomise, randomise_adapters
from torch import nn

import medpeft
from medpeft.formulas.lokr import split

locon = pytest.importorskip("lycoris.modules.locon", reason="lycoris_lora is not installed")
loha = pytest.importorskip("lycoris.modules.loha")
lokr = pytest.importorskip("lycoris.modules.lokr")

LAYERS = {
    "linear": (lambda: nn.Linear(16, 32), (3, 16)),
    "conv": (lambda: nn.Conv2d(16, 32, 3, padding=1, stride=2), (2, 16, 5, 5)),
    "grouped conv": (lambda: nn.Conv2d(32, 32, 3, padding=1, groups=2), (2, 32, 5, 5)),
}


def of_lora(adapter, theirs):
    """Our parameters of LoRA, each with theirs."""
    pairs = [(adapter.down, theirs.lora_down.weight), (adapter.up, theirs.lora_up.weight)]
    if adapter.magnitude is not None:
        pairs.append((adapter.magnitude, theirs.dora_scale))
    return pairs


def of_loha(adapter, theirs):
    """Our parameters of LoHa, each with theirs, which have B turned where there is a core."""
    pairs = []
    for number in (1, 2):
        up, down = getattr(theirs, f"hada_w{number}_a"), getattr(theirs, f"hada_w{number}_b")
        pairs += [(getattr(adapter, f"up_{number}"), up.mT if adapter.tucker else up)]
        pairs += [(getattr(adapter, f"down_{number}"), down)]
        if adapter.tucker:
            pairs += [(getattr(adapter, f"core_{number}"), getattr(theirs, f"hada_t{number}"))]
    return pairs


def of_lokr(adapter, theirs):
    """Our parameters of LoKr, each with theirs, which have D's B turned where there is a core."""
    pairs, names = [], {"whole": "", "up": "_a", "down": "_b"}
    for number, factors in ((1, adapter.first), (2, adapter.second)):
        for key, ours in factors.items():
            if key == "core":
                pairs.append((ours, theirs.lokr_t2))
                continue
            their = getattr(theirs, f"lokr_w{number}{names[key]}")
            pairs.append((ours, their.mT if key == "up" and "core" in factors else their))
    return pairs


CASES = {
    "lora": ("lora", {}, locon.LoConModule, {}, of_lora),
    "rslora": ("lora", {"rslora": True}, locon.LoConModule, {"rs_lora": True}, of_lora),
    "loha": ("loha", {}, loha.LohaModule, {}, of_loha),
    "loha tucker": ("loha", {"tucker": True}, loha.LohaModule, {"use_tucker": True}, of_loha),
    "lokr": ("lokr", {"rank": 1}, lokr.LokrModule, {}, of_lokr),
    # With both factors whole, LyCORIS takes no α.
    "lokr whole": ("lokr", {"rank": 100, "alpha": None}, lokr.LokrModule, {}, of_lokr),
    "lokr tucker": ("lokr", {"rank": 1, "tucker": True}, lokr.LokrModule, {"use_tucker": True}, of_lokr),
    "lokr both": (
        "lokr",
        {"rank": 1, "both": True, "factor": 4},
        lokr.LokrModule,
        {"decompose_both": True, "factor": 4},
        of_lokr,
    ),
}
DORA = ("lora", {"dora": True}, locon.LoConModule, {"weight_decompose": True}, of_lora)


def both(kind, case, alpha=3.0):
    """Our adapted layer and theirs, with the same random numbers, and the pairs of their parameters."""
    method, options, make, their_options, pairs_of = case
    options = {"rank": 2, "alpha": alpha, **options}
    layer = randomise(LAYERS[kind][0]().double())
    plain = nn.Sequential(copy.deepcopy(layer))
    ours = medpeft.apply(nn.Sequential(layer), method, head=None, target="*", **options)
    randomise_adapters(ours, size=0.3)
    theirs = make("it", plain[0], lora_dim=options["rank"], alpha=alpha, **their_options).double()
    pairs = pairs_of(ours[0].adapters[method], theirs)
    with torch.no_grad():
        for own, their in pairs:
            their.copy_(own.view_as(their))
    theirs.apply_to()
    plain[0].requires_grad_(False)
    return ours, plain, theirs, pairs_of(ours[0].adapters[method], theirs)


def assert_same(ours, plain, x):
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-10, atol=1e-10)
    with medpeft.merged(ours):
        torch.testing.assert_close(ours(x), plain(x), rtol=1e-10, atol=1e-10)


def backward(ours, plain, x):
    """Take the gradients of both, at a loss that is not linear in the output."""
    for model in (ours, plain):
        model(x).square().sum().backward()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_equals_that_of_lycoris_also_after_a_step(kind, case):
    ours, plain, theirs, pairs = both(kind, CASES[case])
    x = drawn(*LAYERS[kind][1])
    assert len(pairs) == len(list(ours[0].adapters.parameters())) == len(list(theirs.parameters()))
    assert_same(ours, plain, x)
    start = ours(x).detach()

    backward(ours, plain, x)
    for module in (ours, theirs):
        with torch.no_grad():
            for parameter in filter(lambda p: p.requires_grad, module.parameters()):
                assert parameter.grad.any()
                parameter.sub_(parameter.grad, alpha=1e-5)
    assert (ours(x) - start).abs().max() > 1e-6
    assert_same(ours, plain, x)


@pytest.mark.parametrize("kind", LAYERS)
def test_dora_equals_that_of_lycoris_but_for_the_gradient_through_the_norm(kind):
    ours, plain, theirs, _ = both(kind, DORA)
    x, adapter = drawn(*LAYERS[kind][1]), ours[0].adapters["lora"]
    assert_same(ours, plain, x)

    backward(ours, plain, x)
    of_magnitude = theirs.dora_scale.grad.flatten()
    torch.testing.assert_close(adapter.magnitude.grad, of_magnitude, rtol=1e-10, atol=1e-10)
    # The norm is a constant in the paper's backward, and not in theirs.
    assert (adapter.up.grad - theirs.lora_up.weight.grad.view_as(adapter.up)).abs().max() > 1e-6


@pytest.mark.parametrize(
    ("channels", "factor"), [(768, -1), (768, 8), (3072, 16), (127, 8), (16, 4), (360, -1)]
)
def test_channels_are_split_as_by_lycoris(channels, factor):
    assert split(channels, factor) == lokr.factorization(channels, factor)


def test_a_factor_above_the_square_root_stays_the_first_as_in_peft_and_not_as_in_lycoris():
    assert split(48, 16) == (16, 3)
    assert lokr.factorization(48, 16) == (3, 16)
