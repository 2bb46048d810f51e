"""All that can be seen of a model, to compare before and after."""

import torch


def tensors(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def trace(model):
    """Everything about a model but the values of its tensors."""
    return {
        name: (
            type(m),
            m.training,
            sorted(vars(m)),
            *({k: list(v) for k, v in vars(m).items() if "hooks" in k}.items()),
        )
        for name, m in model.named_modules()
    } | {f"{name} (parameter)": (id(p), p.requires_grad) for name, p in model.named_parameters()}
