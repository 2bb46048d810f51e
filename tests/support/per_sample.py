"""Gradients of every image, one image at a time: what others are compared with."""

import torch
from models import output


def deterministic(model):
    """Put a model into training without what it draws: dropout, and branches left out at random."""
    for module in model.modules():
        for name in ("p", "drop_prob", "drop_path"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model.train()


def images_like(x, count=3):
    generator = torch.Generator().manual_seed(5)
    return torch.randn((count, *x.shape[1:]), generator=generator, dtype=x.dtype)


def loss_of(y):
    """A loss with another gradient at every output, and in every image."""
    return (y * torch.arange(y.numel(), dtype=y.dtype).view_as(y).sin()).sum() + y.square().mean()


def one_at_a_time(model, images):
    """By name, the gradients of every image, (B, …)."""
    gradients = {name: [] for name, p in model.named_parameters() if p.requires_grad}
    for image in images:
        model.zero_grad()
        loss_of(output(model, image[None])).backward()
        for name, each in gradients.items():
            each.append(model.get_parameter(name).grad.clone())
    model.zero_grad()
    return {name: torch.stack(each) for name, each in gradients.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        assert (found[name] - gradient).abs().max() <= 1e-10 * gradient.abs().max(), name
