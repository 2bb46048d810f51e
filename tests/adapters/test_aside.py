"""Other values in the place of the trained ones always come back: after blocks that overlap, in copies, by force."""

import copy
import gc
import pickle
import threading

import pytest
import torch
from put_aside import BLOCKS, X, base, trained
from torch import nn

import medpeft
from medpeft.adapters.aside import others_in_place, put
from medpeft.adapters.record import Adapted


def test_blocks_that_overlap_without_being_nested_end_with_the_trained_values():
    model = trained()
    expected, plain = model(X), base()(X)
    first, second = medpeft.disabled(model), medpeft.disabled(model)

    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(model(X), plain)  # The second needs the base still.
    second.__exit__(None, None, None)

    assert torch.equal(model(X), expected)


def test_blocks_of_two_threads_that_overlap_end_with_the_trained_values(tmp_path):
    model = trained()
    expected, plain = model(X), base()(X)
    inside, leave, within = threading.Event(), threading.Event(), []

    def other():
        with medpeft.disabled(model):
            inside.set()
            leave.wait(30)
            within.append(model(X))

    thread = threading.Thread(target=other, daemon=True)
    with medpeft.disabled(model):
        thread.start()
        assert inside.wait(30)
    with pytest.raises(medpeft.MedpeftError, match="merge does not work inside"):
        medpeft.merge(model)
    leave.set()
    thread.join(30)

    assert torch.equal(within[0], plain)
    assert torch.equal(model(X), expected)
    medpeft.save(model, tmp_path / "a.safetensors")


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_copy_made_inside_a_block_gets_its_trained_values_back_at_the_next_call(block, again, tmp_path):
    model = trained()
    expected = model(X)

    with block(model):
        second = again(model)
        inside = model(X)
        medpeft.save(second, tmp_path / "a.safetensors")
        assert torch.equal(model(X), inside)  # The copy's call is none of the model's.

    assert torch.equal(second(X), expected)
    with medpeft.disabled(second):
        assert torch.equal(second(X), base()(X))
    assert torch.equal(model(X), expected)
    medpeft.remove(second)
    assert torch.equal(second(X), base()(X))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(
    "call", [medpeft.disabled, medpeft.merged, medpeft.merge, medpeft.remove, medpeft.check]
)
def test_a_block_that_was_never_ended_does_not_lock_the_model(block, call):
    model = trained()
    expected = model(X)
    with block(model):
        model = copy.deepcopy(model)

    if call is medpeft.check:
        call(model, X)
        assert torch.equal(model(X), expected)
    elif call in BLOCKS:
        with call(model):
            pass
        assert torch.equal(model(X), expected)
    else:
        torch.testing.assert_close(call(model)(X), expected if call is medpeft.merge else base()(X))


def test_a_forgotten_block_ends_with_its_context_manager():
    model = trained()
    expected = model(X)
    context = medpeft.disabled(model)
    context.__enter__()
    del context
    gc.collect()

    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("head", [nn.Linear(6, 5), nn.Identity()])
@pytest.mark.parametrize("call", [medpeft.remove, lambda model: medpeft.disabled(model).__enter__()])
def test_a_replaced_head_is_named_and_locks_nothing(call, head, tmp_path):
    model = trained()
    model[2] = head
    expected = model(X)

    with pytest.raises(medpeft.MedpeftError, match=r"'2\.weight' and 1 more is gone or of another shape, so"):
        call(model)

    assert torch.equal(model(X), expected)
    if isinstance(head, nn.Linear):
        medpeft.save(model, tmp_path / "a.safetensors")
    assert torch.equal(medpeft.merge(model)[2:](torch.ones(1, 6)), head(torch.ones(1, 6)))


def test_a_head_that_is_replaced_within_disabled_stays_and_all_else_comes_back(tmp_path):
    model = trained()
    expected, head = model[:2](X), nn.Linear(6, 5)

    with medpeft.disabled(model):
        model[2] = head

    assert torch.equal(model(X), head(expected))
    medpeft.save(model, tmp_path / "a.safetensors")


@pytest.mark.parametrize("block", BLOCKS)
def test_casting_a_model_within_a_block_casts_what_comes_back(block):
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    medpeft.apply(model, {"bn": {}, "lora": {"target": "0"}}, head="2", batchnorm="adapt")
    model.train()(X)
    expected = model.eval()(X).double()

    with block(model):
        model.double()

    torch.testing.assert_close(model(X.double()), expected)


def test_a_comparison_before_merging_leaves_the_modes():
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    medpeft.apply(model, "ssf", head="2").train()

    medpeft.merge(model, example_input=X)

    assert all(module.training for module in model.modules())


def test_backward_through_a_forward_of_before_works_after_merged():
    model = trained()
    model[2].requires_grad_(False)
    loss = model(X).sum()

    with medpeft.merged(model):
        model(X)

    loss.backward()
    assert model[0].adapters.lora.up.grad.abs().sum() > 0


def test_a_block_does_not_build_on_what_another_has_left_half_done():
    model = trained()
    expected, plain = model(X), base()(X)
    adapted = Adapted.of(model)
    first = next(iter(adapted.record.base))
    put(model, adapted.record, "disabled", {first: adapted.record.base[first]})  # as far as it came

    with others_in_place(model, "disabled", lambda adapted: adapted.record.base):
        assert torch.equal(model(X), plain)
    assert torch.equal(model(X), expected)


def test_disabled_within_merged_says_so_beside_a_method_that_keeps_the_base():
    model = trained()
    expected = model(X)
    with medpeft.merged(model), pytest.raises(medpeft.MedpeftError, match="disabled does not work inside"):
        medpeft.disabled(model).__enter__()
    assert torch.equal(model(X), expected)
