"""Places of a model switched off one after the other: exact, with intervals, the model untouched."""

import copy

import numpy as np
import pytest
import torch
from every_method import CASES, adapted
from models import make, output

import medpeft
from medpeft.adapters.record import Adapted
from medpeft.reports.attribution import Attribution, PlaceEffect

STREAMS = ("dtl", "lst")
SEPARATE = [case for case in CASES if case not in STREAMS]


def outputs(model, x):
    with torch.no_grad():
        return output(model, x)


def closeness(x, target):
    """A score that is 0 for the outputs `target`, and the lower the farther away they are."""
    return lambda model: float(-(outputs(model, x) - target).double().abs().max())


def base_with_the_trained_head(model):
    other = copy.deepcopy(model)
    selected = Adapted.of(other).record.selected
    head = {name: p.detach().clone() for name, p in other.named_parameters() if selected.get(name) == "head"}
    medpeft.remove(other)
    other.load_state_dict(head, strict=False)
    return other.eval()


@pytest.mark.parametrize("case", SEPARATE)
def test_with_every_place_off_the_model_is_the_base_with_its_head(case):
    model, x = adapted(case)
    found = medpeft.attribute(model, closeness(x, outputs(base_with_the_trained_head(model), x)))
    assert found.base == pytest.approx(0.0, abs=1e-12)  # torch has a fused kernel for the plain attention
    assert found.score < 0 or case == "linear_probe"
    assert bool(found.rows) == (case != "linear_probe")


@pytest.mark.parametrize("case", STREAMS)
def test_a_stream_through_all_blocks_is_refused_with_the_reason(case):
    model, x = adapted(case)
    with pytest.raises(medpeft.MedpeftError, match=r"cannot be switched off alone: .* was handed nothing"):
        medpeft.attribute(model, lambda network: outputs(network, x).mean().item())


def mlp():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 6), torch.nn.Linear(6, 2)
    )
    medpeft.apply(model.double(), "ssf+bias", target=["0", "2"], head="3")
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5)
    return model, torch.randn(40, 4, dtype=torch.float64)


def without(model, name):
    """The model with the base's values at one layer, by hand."""
    other = copy.deepcopy(model)
    layer = other.get_submodule(name)
    layer.adapters.ssf.scale.data.fill_(1)
    layer.adapters.ssf.shift.data.fill_(0)
    layer.bias.data.copy_(Adapted.of(model).record.base[f"{name}.bias"])
    return other


def test_the_loss_of_a_place_is_that_of_the_model_without_it():
    model, x = mlp()
    found = medpeft.attribute(model, lambda network: float(network(x).mean()))
    by_place = {row.place: row for row in found.rows}
    assert by_place.keys() == {"0", "2"}
    for name, row in by_place.items():
        expected = float(outputs(model, x).mean() - outputs(without(model, name), x).mean())
        assert row.loss == pytest.approx(expected, rel=1e-12)
        assert row.loss != 0
        assert (row.methods, row.parameters) == ("ssf+bias", 18)
        assert row.low is None


def test_intervals_are_those_of_a_paired_bootstrap_over_the_images():
    model, x = mlp()
    found = medpeft.attribute(model, lambda network: network(x)[:, 0], resamples=200, seed=3)
    draws = torch.randint(40, (200, 40), generator=torch.Generator().manual_seed(3))
    for row in found.rows:
        lost = outputs(model, x)[:, 0] - outputs(without(model, row.place), x)[:, 0]
        ends = np.quantile(lost[draws].mean(1).numpy(), [0.025, 0.975])
        assert row.low < row.loss < row.high
        assert [row.low, row.high] == pytest.approx(ends.tolist())


def test_a_score_of_some_images_gives_the_same_as_one_of_each():
    model, x = mlp()
    each = medpeft.attribute(model, lambda network: network(x)[:, 0], resamples=50)
    some = medpeft.attribute(
        model,
        lambda outputs, rows: float(outputs[rows, 0].mean()),
        predict=lambda network: network(x),
        resamples=50,
    )
    for one, other in zip(some.rows, each.rows, strict=True):
        assert one.place == other.place
        assert (one.loss, one.low, one.high) == pytest.approx((other.loss, other.low, other.high))


def test_the_model_stays_as_it_is_in_train_mode_too():
    model, x = mlp()
    model.train()
    before = copy.deepcopy(model.state_dict())
    medpeft.attribute(model, lambda network: float(network(x).sum()) if not network.training else 1 / 0)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert Adapted.of(model).acting


def test_blocks_are_places_of_all_layers_inside():
    model, x = adapted("ssf")
    found = medpeft.attribute(model, lambda network: float(outputs(network, x).sum()), by="block")
    places = {row.place for row in found.rows}
    assert {"blocks.0", "blocks.1"} < places
    assert not any(name.startswith("blocks.0.") for name in places)
    total = medpeft.report(model).trainable - medpeft.report(model).head
    assert sum(row.parameters for row in found.rows) == total


def test_the_best_places_are_a_target():
    model, x = adapted("ssf")
    found = medpeft.attribute(model, closeness(x, outputs(model, x)))  # Every place is missed.
    names = found.best(0.5)
    assert len(names) == round(len(found.rows) / 2)
    again = medpeft.apply(make("vit"), "ssf", target=names)
    best = [row.place for row in found.rows[: len(names)]]
    assert "norm" in best  # As a target, its name alone would pick every norm.
    assert {layer for layer, _, _ in Adapted.of(again).layers} == set(best)
    few = found.best(parameters=found.rows[0].parameters)
    assert few[0] == names[0]
    assert "| place | methods | parameters | interval | loss |" in found.to_markdown()


def test_places_without_which_nothing_is_lost_are_not_among_the_best():
    rows = []
    for name, loss in zip("abcd", (0.2, 0.1, 0.0, -0.3), strict=True):
        rows.append(PlaceEffect(name, "ssf", 10, loss))
    found = Attribution("Net", "ssf", 0.5, 0.4, rows)
    assert found.best(1.0) == ["a", "b"]
    assert found.best(0.25) == ["a"]
    assert found.best(parameters=40) == ["a", "b"]
    harmful = Attribution("Net", "ssf", 0.5, 0.4, rows[2:])
    assert harmful.best(1.0) == harmful.best(parameters=40) == ["c"]
    assert harmful.best(parameters=9) == []


def test_draws_without_a_score_are_left_out_of_the_intervals():
    model, x = mlp()
    positive = torch.arange(40) < 2

    def margin(outputs, images):
        return float(outputs[images][positive[images], 0].mean())  # NaN without positives

    found = medpeft.attribute(model, margin, predict=lambda network: network(x), resamples=100, seed=3)
    draws = torch.randint(40, (100, 40), generator=torch.Generator().manual_seed(3))
    without_positives = int((~positive[draws].any(1)).sum())
    assert 0 < without_positives < 100
    assert {row.unscored for row in found.rows} == {without_positives}
    assert all(row.low <= row.loss <= row.high for row in found.rows)
    assert f"up to {without_positives} draws of the images have no score" in str(found)


def test_an_error_of_the_score_is_told_as_it_is():
    model, _ = mlp()
    scores = iter([0.5, float("nan")])
    with pytest.raises(medpeft.MedpeftError, match=r"^score gave nan"):
        medpeft.attribute(model, lambda network: next(scores))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda model: medpeft.attribute(model, lambda network: float("nan")),
            "nan in place of a finite number",
        ),
        (lambda model: medpeft.attribute(model, lambda network: 0.0, by="stage"), "by"),
        (lambda model: medpeft.attribute(model, lambda network: 0.0, resamples=0), "resamples is 0"),
        (
            lambda model: medpeft.attribute(model, lambda network: 0.0, by="block"),
            "No kind of block is known",
        ),
        (lambda model: medpeft.attribute(model, lambda network: 0.0).best(1.5), "share is 1.5"),
        (lambda model: medpeft.attribute(model, lambda network: 0.0).best(parameters="4"), "whole number"),
        (
            lambda model: medpeft.attribute(model, lambda network: None),
            "score gave None in place of a number",
        ),
        (lambda model: medpeft.attribute(model, lambda network: torch.ones(2, 2)), "in place of a number"),
        (lambda model: medpeft.attribute(model, lambda network: torch.ones(0)), "of no images"),
        (lambda model: medpeft.attribute(model, 0.5), "score=0.5 must be a function"),
        (lambda model: medpeft.attribute(model, max, predict=0.5), "predict=0.5 must be a function"),
        (lambda model: medpeft.attribute(torch.nn.Linear(2, 2), lambda network: 0.0), "not adapted"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    model, _ = mlp()
    with pytest.raises(medpeft.MedpeftError, match=message):
        call(model)


@pytest.mark.parametrize("together", [lambda y: {"logits": y}, lambda y: (y, None), lambda y: y.sum()])
def test_outputs_whose_images_cannot_be_counted_are_refused(together):
    model, x = mlp()
    with pytest.raises(
        medpeft.MedpeftError, match=r"predict gave a .* take it out of what the model returns"
    ):
        medpeft.attribute(model, lambda outputs, images: 0.0, predict=lambda network: together(network(x)))


def test_a_score_of_other_images_each_time_is_refused():
    model, _ = mlp()
    counts = iter(range(5, 100))
    with pytest.raises(medpeft.MedpeftError, match="5 images first and now 6"):
        medpeft.attribute(model, lambda network: torch.ones(next(counts)))


def test_inside_disabled_it_is_refused():
    model, _ = mlp()
    with medpeft.disabled(model), pytest.raises(medpeft.MedpeftError, match="leave that first"):
        medpeft.attribute(model, lambda network: 0.0)
