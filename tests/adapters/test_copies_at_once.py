"""Copies of what trains, run on one batch at once by `vmap`, give what each gives by itself, for every method."""

import pytest
import torch
from every_method import CASES, adapted
from models import first
from per_sample import deterministic
from torch.func import functional_call, vmap


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # attention on a CPU: torch loops
@pytest.mark.parametrize("case", CASES)
def test_copies_at_once_compute_what_each_computes(case):
    model, x = adapted(case)
    if case != "full":  # It adapts BatchNorm's statistics, which torch maps in eval mode alone.
        deterministic(model)
    copies = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            copies[name] = torch.stack([parameter.detach(), parameter.detach() * 1.1])

    def run(own):
        return first(functional_call(model, own, (x,)))

    at_once = vmap(run)(copies)
    for place in (0, 1):
        alone = run({name: several[place] for name, several in copies.items()})
        torch.testing.assert_close(at_once[place], alone)
