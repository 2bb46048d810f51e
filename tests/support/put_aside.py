"""A small model whose trained values `disabled` and `merged` put aside."""

import torch
from torch import nn

import medpeft


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))


def trained():
    model = medpeft.apply(base(), {"lora": {"target": "0"}, "bias": {}}, head="2")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return model


X = torch.linspace(-1, 1, 24).view(4, 6)
BLOCKS = [medpeft.disabled, medpeft.merged]
