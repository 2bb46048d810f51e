"""A model so small that thousands of loads are quick, its file, and the proof that a load is exact or refused."""

import json
import time

import torch
from safetensors.torch import load_file
from torch import nn

import medpeft


class Small(nn.Module):
    """A few tensors of every kind that a file holds, so that thousands of loads are quick."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2)
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.fill_(i + 1.0)

    def forward(self, x):
        return self.head(self.norm(self.body(x)))


def adapted():
    return medpeft.apply(Small(), {"lora": {"rank": 2, "target": "body"}, "bn": {}}, batchnorm="adapt")


def saved_small(path):
    """The bytes of a good file, and the tensors in it."""
    model = adapted()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:  # The base stays the one that the file is loaded onto.
                p.add_(0.5)
    medpeft.save(model, path, metadata={"classes": ["benign", "malignant"], "note": "µ-scans"})
    return path.read_bytes(), load_file(path)


MAKERS = {"a base": Small, "an adapted model": adapted}
UNTOUCHED = {}
"""Models that a refused load left as they were, with their tensors, for the next attempt."""


def attempt(data, expected):
    """Load bytes onto a base and into an adapted model: each is loaded exactly, or refused and untouched."""
    for kind, make in MAKERS.items():
        model, before = UNTOUCHED.pop(kind, None) or with_tensors(make())
        started = time.process_time()
        try:
            medpeft.load(model, data)
        except medpeft.CheckpointError as error:
            str(error).encode()
            after = model.state_dict()
            assert list(after) == list(before)
            assert all(torch.equal(t, after[name]) for name, t in before.items())
            UNTOUCHED[kind] = model, before
            loaded = False
        else:
            after = model.state_dict()
            assert all(torch.equal(t, after[name]) for name, t in expected.items())
            loaded = True
        # Its own seconds, on any machine: a header must not cost more than its size allows.
        assert time.process_time() - started < 30
    return loaded


def with_tensors(model):
    return model, {name: t.clone() for name, t in model.state_dict().items()}


def summary_is_whole_or_refused(data):
    """`inspect` too raises nothing else, and what it shows is text."""
    try:
        shown = medpeft.inspect(data)
    except medpeft.CheckpointError:
        return
    str(shown).encode()
    json.dumps(shown.to_dict())
