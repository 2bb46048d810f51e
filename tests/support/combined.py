"""Files to combine, and what their adapters change in the weights."""

import copy
import io

import torch

import medpeft


def trained(base, method, move, seed=0, classes=None, **options):
    """The bytes of a file, and the model, moved from its start by numbers of its own."""
    model = medpeft.apply(copy.deepcopy(base), method, seed=seed, **options)
    generator = torch.Generator().manual_seed(move)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(
                    torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype), alpha=0.2
                )
    file = io.BytesIO()
    medpeft.save(model, file, metadata={"classes": classes} if classes else None)
    return file.getvalue(), model


def weights(model):
    return medpeft.merge(copy.deepcopy(model)).state_dict()


def changes(model, base):
    plain = base.state_dict()
    return {name: tensor - plain[name] for name, tensor in weights(model).items()}


def require_sum(combined, base, models, factors):
    """Merged, the model has the weighted sum of the changes."""
    found, expected = changes(combined, base), {}
    for model, factor in zip(models, factors, strict=True):
        for name, change in changes(model, base).items():
            expected[name] = expected.get(name, 0) + factor * change
    for name, change in expected.items():
        if found[name].is_floating_point():
            assert torch.allclose(found[name], change, rtol=1e-9, atol=1e-12), name
    assert any(change.any() for change in expected.values())
