"""Methods at part of their strength: base + s · (adapted − base), exact at 0 and 1, nested, and undone whatever happens."""

import copy
import threading

import pytest
import torch
from every_method import adapted
from models import output
from put_aside import X, base, trained

import medpeft
from medpeft.adapters.record import Adapted

MERGING = [
    "bias", "dora", "fact", "ia3", "loha", "lokr", "lora", "lora in an encoder", "miss", "norm", "oft", "repadapter",
    "residual_adapter", "shira", "ssf", "svdiff", "svdiff in an attention", "tsa", "vera",
]  # fmt: skip
LAST = {"adaptformer": "up", "adapter_plus": "scale", "convpass": "up", "houlsby": "up", "pfeiffer": "up"}
KINDS = [
    "adaptformer",
    "bn",
    "difffit",
    "full",
    "lst",
    "prefix",
    "repadapter",
    "ssf+lora+svdiff+bias",
    "vpt_deep",
]


def state_between(model, strength):
    """The base's and the merged weights, and what lies between them."""
    merged = copy.deepcopy(model)
    with medpeft.disabled(merged):
        before = {name: t.clone() for name, t in merged.state_dict().items()}
    medpeft.merge(merged)
    after = merged.state_dict()
    for name, tensor in after.items():
        if tensor.is_floating_point():
            start = before.get(name, torch.zeros_like(tensor))
            tensor.copy_(start + strength * (tensor - start))
    return merged


@pytest.mark.filterwarnings("ignore:merge created")
@pytest.mark.parametrize(
    ("case", "strength"), [(case, 0.3) for case in MERGING] + [("lora", -0.5), ("ssf", 1.5)]
)
def test_the_weights_lie_between_those_of_the_base_and_the_merged_ones(case, strength):
    model, x = adapted(case)
    between = state_between(model, strength)
    expected = output(model, x)
    with medpeft.scaled(model, strength), torch.no_grad():
        assert torch.allclose(output(model, x), output(between, x), rtol=1e-9, atol=1e-9)
        assert not torch.allclose(output(model, x), expected, rtol=1e-6)


@pytest.mark.parametrize("case", LAST)
def test_what_no_weight_computes_adds_part_of_its_change(case):
    model, x = adapted(case)
    by_hand = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in by_hand.named_parameters():
            if name.rpartition(".")[2].startswith(LAST[case]):
                parameter.mul_(0.3)
            if name in by_hand._medpeft.selected:
                start = by_hand._medpeft.base[name].to(parameter)
                parameter.copy_(start + 0.3 * (parameter - start))
    with medpeft.scaled(model, 0.3):
        assert torch.allclose(output(model, x), output(by_hand, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", KINDS)
def test_none_is_disabled_and_all_is_the_model_as_trained(case):
    model, x = adapted(case)
    expected = output(model, x)
    with medpeft.disabled(model):
        plain = output(model, x)
    with medpeft.scaled(model, 0):
        assert torch.equal(output(model, x), plain)
    with medpeft.scaled(model, 1):
        assert torch.equal(output(model, x), expected)
    assert torch.equal(output(model, x), expected)


@pytest.mark.parametrize("case", ["vpt_deep", "vpt_shallow", "prefix"])
def test_what_has_no_part_is_refused(case):
    model, x = adapted(case)
    expected = output(model, x)
    with pytest.raises(medpeft.MedpeftError, match=f"'{case}' acts whole or not at all"):
        medpeft.scaled(model, 0.5).__enter__()
    assert torch.equal(output(model, x), expected)


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), "1", None, True])
def test_a_strength_is_a_finite_number(strength):
    with pytest.raises(medpeft.MedpeftError, match=r"strength=.* must be a finite number"):
        medpeft.scaled(trained(), strength).__enter__()


def failing(model):
    """The output inside a block that ends by an error."""
    try:
        with medpeft.scaled(model, 2.0):
            double = model(X)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        return double


def test_the_innermost_block_decides_and_errors_undo_it():
    model = trained()
    with medpeft.scaled(model, 0.5):
        half = model(X)
    with medpeft.scaled(model, 0.5):
        double = failing(model)
        assert torch.equal(model(X), half)
        with medpeft.disabled(model):
            assert torch.equal(model(X), base()(X))
            with medpeft.scaled(model, 2.0):
                assert torch.equal(model(X), double)
            assert torch.equal(model(X), base()(X))
        assert torch.equal(model(X), half)
    assert Adapted.of(model).acting


def test_saving_merging_and_loading_wait_until_the_block_is_left(tmp_path):
    model = trained()
    medpeft.save(model, tmp_path / "a.safetensors")
    before = model(X)
    with medpeft.scaled(model, 0.5):
        for call, error in (
            (lambda: medpeft.save(model, tmp_path / "b.safetensors"), "leave it first"),
            (
                lambda: medpeft.load(model, tmp_path / "a.safetensors"),
                r"Leave medpeft\.disabled, scaled or merged",
            ),
            (lambda: medpeft.merge(model), "does not work inside"),
            (lambda: medpeft.remove(model), "does not work inside"),
            (lambda: medpeft.merged(model).__enter__(), "does not work inside"),
            (lambda: medpeft.check(model, X), "has its adapters scaled; leave"),
        ):
            with pytest.raises(medpeft.MedpeftError, match=error):
                call()
    with medpeft.merged(model), pytest.raises(medpeft.MedpeftError, match="does not work inside"):
        medpeft.scaled(model, 0.5).__enter__()
    assert torch.equal(model(X), before)


def test_threads_share_one_strength():
    model, refused = trained(), []
    expected = model(X)
    with medpeft.scaled(model, 0.5):
        half = model(X)
        barrier = threading.Barrier(2, timeout=30)

        def run():
            with medpeft.scaled(model, 0.5):
                barrier.wait()  # Both blocks are open …
                barrier.wait()  # … and the other one has ended.
                refused.append(torch.equal(model(X), half))
            try:
                medpeft.scaled(model, 0.25).__enter__()
            except medpeft.MedpeftError as error:
                refused.append(str(error))

        thread = threading.Thread(target=run)
        thread.start()
        barrier.wait()
        with pytest.raises(medpeft.MedpeftError, match=r"another thread is within a block at 0\.5"):
            medpeft.disabled(model).__enter__()
    barrier.wait()
    thread.join(30)
    with medpeft.scaled(model, 0.25):
        pass
    assert refused == [True]
    assert torch.equal(model(X), expected)


def test_a_copy_made_inside_gets_its_trained_values_back():
    model = trained()
    with medpeft.scaled(model, 0.5):
        other = copy.deepcopy(model)
        assert torch.equal(other(X), model(X))
    medpeft.state(other)
    assert torch.equal(other(X), model(X))


def test_statistics_that_adapt_have_no_strength_outside_0_and_1():
    model, x = adapted("bn", batchnorm="adapt")
    with medpeft.scaled(model, 0.5):
        assert output(model, x).isfinite().all()
    with pytest.raises(medpeft.MedpeftError, match="variances below 0"):
        medpeft.scaled(model, 1.5).__enter__()


def test_gradients_inside_are_those_of_part_of_the_change():
    model = trained()
    with medpeft.scaled(model, 0.25):
        model(X).square().sum().backward()
    assert model[0].adapters.lora.up.grad.abs().sum() > 0
