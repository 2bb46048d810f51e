"""Whatever ends a forward in its middle, nothing stays in front of a weight."""

import asyncio
import copy

import pytest
import torch
from every_method import CASES, adapted, base
from models import output
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import medpeft

ENDINGS = (KeyboardInterrupt, SystemExit, asyncio.CancelledError, GeneratorExit, MemoryError)


class EndAt(TorchDispatchMode):
    """Raises in the place of one of the operations inside it."""

    def __init__(self, number, ending):
        super().__init__()
        self.left, self.ending = number, ending

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.left == 0:
            raise self.ending
        self.left -= 1
        return func(*args, **(kwargs or {}))


def operations(model, x):
    with EndAt(-1, None) as mode:
        output(model, x)
    return -1 - mode.left


def attributes(model):
    return {
        name: {n: v for n, v in vars(m).items() if n != "_modules"}.keys()
        for name, m in model.named_modules()
    }


@pytest.mark.parametrize("case", CASES)
def test_an_interrupted_forward_leaves_nothing_behind(case):
    model, x = adapted(case)
    expected, about = output(model, x), attributes(model)
    with medpeft.merged(model) if medpeft_can_merge(model) else medpeft.disabled(model):
        otherwise = output(model, x)
    total = operations(model, x)

    for i, ending in enumerate(ENDINGS):
        with pytest.raises(ending), EndAt(total * (2 * i + 1) // (2 * len(ENDINGS)), ending):
            output(model, x)
        assert attributes(model) == about
        assert torch.equal(output(copy.deepcopy(model), x), expected)

    assert torch.equal(output(model, x), expected)
    with medpeft.merged(model) if medpeft_can_merge(model) else medpeft.disabled(model):
        assert torch.equal(output(model, x), otherwise)
    medpeft.remove(model)
    plain = base(case)
    for (_, mine), (_, original) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(mine, original)
    torch.testing.assert_close(output(model, x), output(plain, x), rtol=1e-12, atol=1e-12)


def medpeft_can_merge(model):
    try:
        with medpeft.merged(model):
            return True
    except medpeft.MedpeftError:
        return False


def test_an_interrupted_step_of_svdiff_leaves_the_base_to_be_removed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    plain = copy.deepcopy(model)
    medpeft.apply(model, "svdiff", head="2")
    with torch.no_grad():
        model[0].adapters.svdiff.delta.add_(1.0)
    x = torch.randn(4, 8)

    with pytest.raises(KeyboardInterrupt), EndAt(2, KeyboardInterrupt):
        model(x)
    medpeft.remove(model)

    assert torch.equal(model(x), plain(x))
    assert not set(vars(model[0])) & {"weight", "bias", "forward"}
