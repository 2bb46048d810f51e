"""A call never meets values that another thread is about to put in, or has not brought back yet."""

import threading

import pytest
import torch
from put_aside import BLOCKS, X, base, trained

import medpeft
from medpeft.adapters import aside, running
from medpeft.adapters.aside import put
from medpeft.checkpoint import load as loading
from medpeft.checkpoint import save as saving
from medpeft.surgery import apply as surgery
from medpeft.surgery import merge as merging


class Leaving(threading.Thread):
    """A thread in a block, which it leaves when told; it stops after the block is closed and before it is settled."""

    def __init__(self, block, model, monkeypatch):
        super().__init__(daemon=True)
        self.block, self.model = block, model
        self.inside, self.leave, self.closed, self.settle = (threading.Event() for _ in range(4))
        close_block = aside.close_block

        def close_and_wait(model, token):
            close_block(model, token)
            if threading.current_thread() is self and not self.closed.is_set():
                self.closed.set()
                self.settle.wait(30)

        monkeypatch.setattr(aside, "close_block", close_and_wait)

    def run(self):
        with self.block(self.model):
            self.inside.set()
            self.leave.wait(30)


@pytest.mark.parametrize("call", [medpeft.merged, medpeft.disabled, medpeft.merge, medpeft.remove])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_that_is_closed_and_not_settled_yet_is_in_nobodys_way(block, call, monkeypatch):
    model, ran = trained(), []
    expected, plain = model(X), base()(X)
    other = Leaving(block, model, monkeypatch)
    other.start()
    assert other.inside.wait(30)
    switching = running.switching

    def leave_first(model, action):
        # The other block was open when this thread looked, and is closed when it has its turn.
        other.leave.set()
        assert other.closed.wait(30)
        return switching(model, action)

    for module in (aside, surgery):
        monkeypatch.setattr(module, "switching", leave_first)
    if call in BLOCKS:
        with call(model):
            ran.append(model(X))
            other.settle.set()
            other.join(30)
            ran.append(model(X))
    else:
        ran.append(call(model)(X))
        other.settle.set()
        other.join(30)
        ran.append(model(X))

    for output in ran:
        torch.testing.assert_close(output, plain if call in (medpeft.disabled, medpeft.remove) else expected)
    if call in BLOCKS:
        assert torch.equal(model(X), expected)


class Disabling(threading.Thread):
    """A thread that wants the base in the middle of another call, and keeps the reason if that is refused."""

    def __init__(self, model):
        super().__init__(daemon=True)
        self.model, self.refused = model, ""
        self.inside, self.leave = threading.Event(), threading.Event()

    def run(self):
        try:
            with medpeft.disabled(self.model):
                self.inside.set()
                self.leave.wait(30)
        except medpeft.MedpeftError as error:
            self.refused = str(error)

    def before(self, function):
        """The function, before which this thread begins: it waits for its turn, or would be inside."""

        def began(*args, **options):
            if not self.ident:
                self.start()
                self.inside.wait(0.2)
            return function(*args, **options)

        return began

    def end_before(self, function):
        """The function, before which this thread ends if it is inside."""

        def ended(*args, **options):
            self.end()
            return function(*args, **options)

        return ended

    def end(self):
        self.leave.set()
        if self.inside.is_set():
            self.join(30)


def with_values_that_merge():
    """A model whose merged tensors are computed of what `disabled` puts aside."""
    torch.manual_seed(1)
    model = medpeft.apply(base(), "ssf+bias", head="2")
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
        parameter.data += torch.rand_like(parameter)
    return model


@pytest.mark.parametrize("call", [medpeft.merged, medpeft.merge])
def test_merging_does_not_read_values_that_another_thread_has_put_in_meanwhile(call, monkeypatch):
    model = with_values_that_merge()
    expected, other = model(X), Disabling(model)
    monkeypatch.setattr(merging, "_merged_into", other.before(merging._merged_into))
    for module in (aside, surgery):
        monkeypatch.setattr(module, "put", other.end_before(put))
    if call is medpeft.merged:
        with medpeft.merged(model):
            torch.testing.assert_close(model(X), expected)
    else:
        medpeft.merge(model)
    other.join(30)

    torch.testing.assert_close(model(X), expected)
    assert not other.is_alive()
    if call is medpeft.merge:
        assert "not adapted" in other.refused


def test_save_does_not_write_values_that_another_thread_has_put_in_meanwhile(tmp_path, monkeypatch):
    model = trained()
    expected, other = model(X), Disabling(model)
    monkeypatch.setattr(saving, "_document", other.before(saving._document))

    medpeft.save(model, tmp_path / "a.safetensors")
    other.leave.set()
    other.join(30)
    assert torch.equal(medpeft.load(base(), tmp_path / "a.safetensors")(X), expected)


def test_load_does_not_fill_a_model_that_another_thread_has_disabled_meanwhile(tmp_path, monkeypatch):
    model = trained()
    expected = model(X)
    medpeft.save(model, tmp_path / "a.safetensors")
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
        parameter.data.zero_()
    other = Disabling(model)
    monkeypatch.setattr(loading, "read_values", other.before(loading.read_values))

    medpeft.load(model, tmp_path / "a.safetensors")
    other.leave.set()
    other.join(30)
    assert torch.equal(model(X), expected)


def test_a_block_that_waited_while_the_adapters_were_taken_off_changes_nothing():
    model, refused = trained(), []
    plain = base()(X)

    def disable():
        try:
            with medpeft.disabled(model):
                pass
        except medpeft.MedpeftError as error:
            refused.append(str(error))

    thread = threading.Thread(target=disable, daemon=True)
    with running.switching(model, "test"):
        thread.start()
        thread.join(0.1)  # It has looked at the record, and waits for its turn.
        medpeft.remove(model)
    thread.join(30)

    assert len(refused) == 1
    assert torch.equal(model(X), plain)
