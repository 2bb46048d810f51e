"""Ctrl-C at any line of a call: afterwards it is complete, or it has not been.

Each test takes some of the lines. All of them hold, `SHARES = 1`, and take a quarter of an hour.
"""

import copy
import faulthandler
import sys
import threading
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from traces import same, tensors, trace

import medpeft

SHARES = 37
OWN = str(Path(medpeft.__file__).parent)
METHODS = {
    "lora": {"target": "linear"},
    "bias": {},
    "bn": {"batchnorm": "adapt"},
    "svdiff": {"target": "linear"},
    "ssf+bias": {},
}


pytestmark = [
    pytest.mark.filterwarnings("ignore:merge created"),
    # A file that is opened when the interrupt comes is closed a little later.
    pytest.mark.filterwarnings("ignore:.*Exception ignored in.*FileIO"),
]


@pytest.fixture(autouse=True)
def _never_hang():
    faulthandler.dump_traceback_later(120, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


class Lines:
    """Notes the lines of the package's own code that run, and interrupts at one of them."""

    def __init__(self, at=-1):
        self.at, self.lines = at, []

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *error):
        sys.settrace(self.before)

    def trace(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(OWN):
            return None
        if event == "line":
            self.lines.append((frame.f_code.co_filename, frame.f_lineno))
            if len(self.lines) - 1 == self.at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self.trace


def moments(call, model, method):
    """First and last moment at which each line of a call runs; each method takes another share of them."""
    call(copy.deepcopy(model))  # A first call fills caches.
    with Lines() as ran:
        call(model)
    first, last = {}, {}
    for i, line in enumerate(ran.lines):
        first.setdefault(line, i)
        last[line] = i
    all_moments = sorted({*first.values(), *last.values()})
    return all_moments[list(METHODS).index(method) % SHARES :: SHARES]


def interrupted(call, model, at):
    with pytest.raises(KeyboardInterrupt), Lines(at):
        call(model)


@cache
def drawn():
    """A base and a batch, drawn once: to seed torch takes longer than to run them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    model[1].running_mean.normal_()
    model[0].weight.requires_grad_(False)
    return model, torch.randn(4, 6)


def base():
    model = copy.deepcopy(drawn()[0])
    model[3].weight.grad = torch.ones(2, 6)
    return model


def adapt(model, method):
    return medpeft.apply(model, method, head="3", **METHODS[method])


def trained(method, seed=1):
    """Adapt and, as if trained, move all that trains."""
    torch.manual_seed(seed)
    model = adapt(base(), method)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) / 4
    if METHODS[method]:
        model.train()(torch.randn(8, 6))  # Statistics that adapt.
    return model


def out(model):
    """Run in eval mode; the modes stay."""
    with torch.no_grad():
        return copy.deepcopy(model).eval()(drawn()[1])


def is_plain(model, plain):
    """Whether a model is the plain one with no trace of the package, whatever its values."""
    return {k: v[1:] if "parameter" in k else v for k, v in trace(model).items()} == {
        k: v[1:] if "parameter" in k else v for k, v in trace(plain).items()
    }


def require_whole(model, method, expected):
    """An adapted model gives what it gave, and everything can be done with it."""
    assert torch.equal(out(model), expected)
    with medpeft.disabled(model):
        assert torch.equal(out(model), out(base()))
    with medpeft.merged(model):
        torch.testing.assert_close(out(model), expected)
    assert torch.equal(out(model), expected)
    runs_in_another_thread(model)
    medpeft.remove(model)
    assert is_plain(model, base().train(model.training))
    assert same(tensors(model), tensors(base()))


def runs_in_another_thread(model):
    """No lock was left held."""
    thread = threading.Thread(target=lambda: model(torch.randn(4, 6)), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_apply_leaves_the_base_or_an_adapted_model(method):
    def call(model):
        adapt(model, method)

    for at in moments(call, base(), method):
        model = base()
        before = trace(model)
        interrupted(call, model, at)
        if "_medpeft" in vars(model):
            require_whole(model, method, out(adapt(base(), method)))
        else:
            assert trace(model) == before
            assert same(tensors(model), tensors(base()))
            assert torch.equal(model[3].weight.grad, torch.ones(2, 6))
        call(base())


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_load_leaves_the_base_or_the_loaded_model(method, tmp_path):
    path = tmp_path / "a.safetensors"
    original = trained(method)
    medpeft.save(original, path)
    expected = out(original)

    def call(model):
        medpeft.load(model, path)

    for at in moments(call, base(), method):
        model = base()
        before = trace(model)
        interrupted(call, model, at)
        if "_medpeft" in vars(model):
            require_whole(model, method, expected)
        else:
            assert trace(model) == before
            assert same(tensors(model), tensors(base()))
            assert torch.equal(model[3].weight.grad, torch.ones(2, 6))


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_load_into_an_adapted_model_copies_all_or_nothing(method, tmp_path):
    path = tmp_path / "a.safetensors"
    original, other = trained(method), trained(method, seed=3)
    medpeft.save(original, path)
    loaded, not_loaded = out(original), out(other)

    def call(model):
        medpeft.load(model, path)

    for at in moments(call, copy.deepcopy(other), method):
        model = copy.deepcopy(other)
        interrupted(call, model, at)
        result = out(model)
        assert torch.equal(result, loaded) or torch.equal(result, not_loaded)
        require_whole(model, method, result)


def within(context):
    def call(model):
        with context(model):
            pass

    return call


def scaled_twice(model):
    with medpeft.scaled(model, 0.5), medpeft.scaled(model, 0.25):
        pass


CALLS = {
    "remove": medpeft.remove,
    "merge": medpeft.merge,
    "merge after a comparison": lambda model: medpeft.merge(model, example_input=torch.ones(4, 6)),
    "merged": within(medpeft.merged),
    "disabled": within(medpeft.disabled),
    "scaled within scaled": scaled_twice,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CALLS)
def test_an_interrupted_call_is_complete_or_undone(name, method):
    call, original = CALLS[name], trained(method)
    expected = out(original)
    merged = out(medpeft.merge(copy.deepcopy(original)))
    modes = [module.training for module in original.modules()]
    for at in moments(call, copy.deepcopy(original), method):
        model = copy.deepcopy(original)
        interrupted(call, model, at)
        if "_medpeft" in vars(model):
            assert [module.training for module in model.modules()] == modes
            require_whole(model, method, expected)
        elif name == "remove":
            assert is_plain(model, base())
            assert torch.equal(out(model), out(base()))
        else:
            assert is_plain(model, base())
            assert torch.equal(out(model), merged)
