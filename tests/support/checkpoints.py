"""An adapted model with values of its own, its file, and loads that must fail and leave everything as it was."""

import pytest
import torch
from golden.model import Golden

import medpeft


def trained(model, method="lora", seed=1, **options):
    """An adapted model with other values in everything that trains, in eval mode."""
    medpeft.apply(model, method, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape, generator=generator).to(p.dtype))
        if options.get("batchnorm") == "adapt":
            for name, buffer in model.named_buffers():
                if "running" in name:
                    buffer.mul_(1.5)
    return model.eval()


def bits(model):
    """Everything that a failed call must leave as it was."""
    state = {name: t.detach().clone() for name, t in model.state_dict().items()}
    return (
        state,
        [type(m) for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        set(vars(model)),
    )


def same(before, after):
    return (
        before[1:] == after[1:]
        and before[0].keys() == after[0].keys()
        and all(
            torch.equal(t, after[0][name]) and t.dtype == after[0][name].dtype
            for name, t in before[0].items()
        )
    )


def refusal(model, path, **options):
    """The message of a load that must fail and leave the model as it was."""
    before = bits(model)
    with pytest.raises(medpeft.CheckpointError) as caught:
        medpeft.load(model, path, **options)
    assert same(before, bits(model))
    return str(caught.value)


def saved_file(path):
    medpeft.save(trained(Golden(), "lora+bias"), path, metadata={"classes": ["a", "b", "c"], "epochs": 3})
    return path
