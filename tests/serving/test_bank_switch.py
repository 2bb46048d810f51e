"""Switching a model from one adapter of a bank to another: beside threads, interrupts, copies, and other banks."""

import copy
import gc
import itertools
import pickle
import threading

import pytest
import torch
from banks import bank_of, images, several
from checkpoints import bits, same
from every_method import perturb
from golden.model import Golden
from replicas import replica_of

import medpeft
from medpeft.serving import switch


@pytest.mark.parametrize("names", [("lora 0", "lora 2"), ("lora 0", "ssf 0", None), (None, "bias 1")])
def test_the_model_itself_may_run_beside_switches(names):
    made = several()
    plain, x, outputs, errors, ended = Golden().eval(), images(6), [], [], threading.Event()
    bank = bank_of(made, plain)
    bank.use(names[0])

    def run():
        try:
            while not ended.is_set():
                with torch.no_grad():
                    outputs.append(plain(x))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for name in names * 10:
        bank.use(name)
    ended.set()
    for thread in threads:
        thread.join(60)
    right = [(made[name] if name else Golden().eval())(x).detach() for name in names]
    assert outputs
    assert errors == []
    assert all(any(torch.equal(output, other) for other in right) for output in outputs)


def test_the_model_is_wired_for_the_life_of_its_banks_and_no_longer():
    plain, x = Golden().eval(), images(2)
    expected, before = plain(x), dict(vars(plain))
    banks = [medpeft.Bank(plain), medpeft.Bank(plain)]
    while banks:
        medpeft.remove(medpeft.apply(plain, "lora"))
        assert torch.equal(plain(x), expected)
        assert vars(plain).keys() - before.keys() >= {"forward"}
        banks.pop()
        gc.collect()
    medpeft.remove(medpeft.apply(plain, "lora"))
    assert vars(plain).keys() == before.keys()
    assert torch.equal(plain(x), expected)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), replica_of]
)
def test_a_copy_of_a_model_with_a_bank_computes_with_its_own_tensors(copied):
    plain, x = Golden().eval(), images(2)
    bank = bank_of(several(), plain)
    for name in (None, "lora 0", None):
        bank.use(name)
        expected, other = plain(x), copied(plain)
        assert torch.equal(other(x), expected)
        with torch.no_grad():
            other.head.bias.add_(1)
        assert torch.equal(plain(x), expected)
        torch.testing.assert_close(other(x), expected + 1)


@pytest.mark.parametrize(
    ("used", "place"),
    [
        (None, "_install"),
        (None, "carry_out"),
        *itertools.product(["bias 0", "lora 1"], ["_install", "carry_out", "make_plain"]),
    ],
)
def test_a_switch_that_fails_leaves_what_was_there(monkeypatch, used, place):
    plain, x = Golden().eval(), images(2)
    bank = bank_of(several(), plain)
    bank.use(used)
    output, before = plain(x), bits(plain)
    own, calls = getattr(switch, place), []

    def failing(*arguments, **keywords):
        result = own(*arguments, **keywords) if place == "make_plain" else None
        calls.append(place)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return result if place == "make_plain" else own(*arguments, **keywords)

    monkeypatch.setattr(switch, place, failing)
    with pytest.raises(KeyboardInterrupt):
        bank.use("ssf 0")
    assert bank.used == used
    assert torch.equal(plain(x), output)
    assert same(before, bits(plain))
    bank.use("ssf 0")
    assert bank.used == "ssf 0"


@pytest.mark.parametrize("other", ["lora 0", "lora 2", "ssf 0", None])
def test_a_switch_that_fails_leaves_what_was_trained(monkeypatch, other):
    plain, x = Golden().eval(), images(2)
    bank = bank_of(several(), plain)
    bank.use("lora 0")
    perturb(plain)
    output, before = plain(x), bits(plain)
    copies = []

    def failing(tensor, *arguments):
        copies.append(tensor)
        if len(copies) == 2:
            raise KeyboardInterrupt
        return own_copy(tensor, *arguments)

    own_copy = torch.Tensor.copy_
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", failing)
        with pytest.raises(KeyboardInterrupt):
            bank.use(other, discard=True)
    assert torch.equal(plain(x), output)
    assert same(before, bits(plain))
    with pytest.raises(medpeft.MedpeftError, match="was trained since"):
        bank.use(other)
    bank.use(other, discard=True)
    assert torch.equal(plain(x), (several()[other] if other else Golden().eval())(x))
