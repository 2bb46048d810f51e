"""Replicas of `nn.DataParallel` on one CPU."""

import importlib
from unittest import mock

import torch


def cloned(tensors, devices, detach=False):
    """What torch's broadcast to several GPUs does, on one CPU."""
    return [[tensor.detach().clone() if detach else tensor.clone() for tensor in tensors] for _ in devices]


def replicas_of(model):
    """Two replicas of `nn.DataParallel`, both on the CPU."""
    module = importlib.import_module("torch.nn.parallel.replicate")
    with (
        mock.patch.object(module, "_broadcast_coalesced_reshape", cloned),
        mock.patch.object(module, "_get_device_index", lambda device, *_: device),
    ):
        return module.replicate(model, [torch.device("cpu")] * 2)


def replica_of(model):
    return replicas_of(model)[0]
