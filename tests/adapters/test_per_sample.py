"""The gradients of every image by `vmap(grad(functional_call))` are those of one image at a time, for every method."""

import pytest
from every_method import CASES, adapted
from models import first
from per_sample import assert_same, deterministic, images_like, loss_of, one_at_a_time
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import medpeft


def test_every_method_is_tried():
    assert set(medpeft.methods()) <= set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_a_mapped_gradient_is_that_of_one_image_at_a_time(case):
    model, x = adapted(case)
    if case != "full":  # It adapts BatchNorm's statistics, which torch maps in eval mode alone.
        deterministic(model)
    images = images_like(x)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters, image):
        return loss_of(first(functional_call(model, parameters, (image[None],))))

    with sdpa_kernel(SDPBackend.MATH):  # The kernel for CPUs has no rule for vmap: torch warns, and loops.
        found = vmap(grad(loss), (None, 0))(trained, images)

    assert_same(found, one_at_a_time(model, images))
