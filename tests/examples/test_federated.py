"""What an exchange between sites computes, without Flower: averages, what travels and is refused, who has what."""

import dataclasses
import tomllib

import numpy as np
import pytest
import torch
from federated.averaging import error, factors_of, leading_factors, mean, refactored
from federated.exchange import Terms, accept, put
from federated.settings import Settings
from federated.sites import FOLDS, read_site, read_sites, together
from federated.training import make_model
from places import EXAMPLES
from torch import nn
from trainer.errors import TrainerError

import medpeft

TINY = {"model": "test_efficientnet", "no_pretrained": True, "image_size": 32}
CLASSES = ["across", "down"]


def settings(**given):
    return Settings.of(TINY | given)


def drawn_state(model, seed):
    """A state of that model with other values."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=generator) for name, tensor in medpeft.state(model).items()
    }


def test_the_mean_is_weighted_and_keeps_kinds_of_numbers():
    states = [
        {"a": torch.tensor([1.0]), "n": torch.tensor(3)},
        {"a": torch.tensor([5.0]), "n": torch.tensor(10)},
    ]
    averaged = mean(states, [3, 1])
    assert averaged["a"].tolist() == [2.0]
    assert averaged["a"].dtype == torch.float32
    assert averaged["n"].item() == 5
    assert averaged["n"].dtype == torch.int64


def test_variances_become_that_of_all_images_together():
    images = torch.randn(3, 40, 5, dtype=torch.float64) + torch.tensor([0.0, 2.0, -1.0])[:, None, None]
    parts = [images[0], images[1, :20], images[2, :10]]
    states = [
        {"bn.running_mean": part.mean(0), "bn.running_var": part.var(0, correction=0)} for part in parts
    ]
    averaged, everything = mean(states, [40, 20, 10]), torch.cat(parts)
    torch.testing.assert_close(averaged["bn.running_mean"], everything.mean(0))
    torch.testing.assert_close(averaged["bn.running_var"], everything.var(0, correction=0))


def models_and_states(average, count=3):
    model = make_model(settings(average=average), CLASSES)
    return model, [drawn_state(model, seed) for seed in range(count)]


def test_products_of_high_rank_are_cut_by_what_the_singular_values_say():
    ups, downs = torch.randn(3, 9, 2, dtype=torch.float64), torch.randn(3, 2, 7, dtype=torch.float64)
    parts = list(zip(ups, downs, strict=True))
    weights = [0.5, 0.3, 0.2]
    exact = sum(weight * up @ down for weight, (up, down) in zip(weights, parts, strict=True))
    up, down = leading_factors(parts, weights, 2)
    left, values, right = torch.linalg.svd(exact, full_matrices=False)
    torch.testing.assert_close(up @ down, left[:, :2] * values[:2] @ right[:2])
    lengths = torch.cat([down for _, down in parts]).norm(dim=1).mean()
    torch.testing.assert_close(down.norm(dim=1), lengths.expand(2))
    up, down = leading_factors(parts, weights, 6)
    torch.testing.assert_close(up @ down, exact)


def test_the_error_of_an_average_is_measured_and_products_err_least():
    model, states = models_and_states("products")
    factors, weights = factors_of(model), [3, 2, 1]
    plain, cut = mean(states, weights), refactored(states, weights, factors)
    missed = whole = 0.0
    for one in factors:
        exact = sum(w / 6 * s[one.up] @ s[one.down] for w, s in zip(weights, states, strict=True))
        missed += float((plain[one.up] @ plain[one.down] - exact).square().sum())
        whole += float(exact.square().sum())
    assert error(plain, states, weights, factors) == pytest.approx((missed / whole) ** 0.5, rel=1e-5)
    assert 0.05 < error(cut, states, weights, factors) < error(plain, states, weights, factors)
    assert error(states[0], states[:1], [5], factors) < 1e-12
    assert all(torch.equal(cut[name], plain[name]) for name in plain if "lora" not in name)


def test_with_one_frozen_a_the_mean_is_exact():
    model, states = models_and_states("frozen_a")
    own = medpeft.state(model)
    for state in states:
        state |= {one.down: own[one.down] for one in factors_of(model)}
    assert error(mean(states, [3, 2, 1]), states, [3, 2, 1], factors_of(model)) < 1e-7


def test_parts_of_a_fused_projection_are_averaged_apart():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    model = medpeft.apply(nn.Sequential(attention), {"lora": {"rank": 2, "parts": "qv"}}, head=None)
    (one,) = factors_of(model)
    states = [drawn_state(model, seed) for seed in range(2)]
    cut = refactored(states, [1, 1], [one])
    assert one.sizes == (8, 8)
    for part in range(2):
        exact = sum(list(one.parts(state))[part][0] @ list(one.parts(state))[part][1] for state in states) / 2
        values = torch.linalg.svdvals(exact)
        up, down = list(one.parts(cut))[part]
        assert float((up @ down - exact).norm()) == pytest.approx(float(values[2:].norm()), rel=1e-5)


@pytest.mark.parametrize(
    ("local", "kept"), [("", ()), ("head", ("classifier",)), ("head,batchnorm", ("classifier", "bn"))]
)
def test_what_is_local_does_not_travel(local, kept):
    own = settings(batchnorm="adapt", local=local)
    model = make_model(own, CLASSES)
    left_out = {name for name in medpeft.state(model) if any(word in name for word in kept)}
    terms = Terms.of(model, own)
    assert set(medpeft.state(model)) - set(terms.shared) == left_out
    assert terms.sent == terms.shared


def test_a_frozen_a_travels_one_way():
    own = settings(average="frozen_a")
    model = make_model(own, CLASSES)
    terms = Terms.of(model, own)
    assert set(terms.shared) - set(terms.sent) == {one.down for one in factors_of(model)}


SPOILED = {
    "a value": (
        lambda arrays: arrays["classifier.bias"].__setitem__(0, np.nan),
        "'classifier.bias' .* not finite",
    ),
    "a shape": (lambda arrays: arrays.update({"classifier.bias": np.zeros(5)}), r"has the shape \(5,\)"),
    "a tensor less": (lambda arrays: arrays.pop("classifier.bias"), "1 tensors are missing"),
    "a tensor more": (lambda arrays: arrays.update(x=np.zeros(1)), "1 are not awaited, such as 'x'"),
}


@pytest.mark.parametrize("spoiled", SPOILED)
def test_what_is_not_in_order_is_refused_and_changes_nothing(spoiled):
    own = settings()
    model = make_model(own, CLASSES)
    arrays = medpeft.state(model, numpy=True)
    spoil, message = SPOILED[spoiled]
    spoil(arrays)
    before, terms = medpeft.state(model), Terms.of(model, own)
    with pytest.raises(medpeft.MedpeftError, match=message):
        accept(model, terms, arrays, terms.base, 7)
    assert all(torch.equal(before[name], tensor) for name, tensor in medpeft.state(model).items())


def test_another_base_and_a_senseless_weight_are_refused():
    own = settings()
    model = make_model(own, CLASSES)
    terms, other = Terms.of(model, own), Terms.of(make_model(settings(seed=1), CLASSES), own)
    arrays = medpeft.state(model, numpy=True)
    with pytest.raises(
        medpeft.MedpeftError, match=f"digest {other.base}, and the coordinator's {terms.base}"
    ):
        accept(model, terms, arrays, other.base, 7)
    for weight in (0, -1, float("nan"), float("inf")):
        with pytest.raises(medpeft.MedpeftError, match="trained on"):
            accept(model, terms, arrays, terms.base, weight)
    assert accept(model, terms, arrays, terms.base, 7).keys() == arrays.keys()


def test_later_states_lie_over_earlier_ones():
    model = make_model(settings(), CLASSES)
    put(model, {"classifier.bias": np.array([1.0, 2.0])}, {"classifier.bias": torch.tensor([3.0, 4.0])})
    assert model.classifier.bias.tolist() == [3.0, 4.0]


def test_one_data_set_becomes_unequal_sites_that_share_no_patient():
    sites, classes = read_sites(settings())
    assert classes == ["stained", "unstained"]
    sizes = [len(site.labels) for site in sites]
    assert sum(sizes) == 576
    assert sizes[0] > sizes[2]
    pixels = [{image.numpy().tobytes() for image in site.pixels} for site in sites]
    assert len(set.union(*pixels)) == sum(map(len, pixels)), "an image is at two sites"
    shares = [float(site.labels.float().mean()) for site in sites]
    assert max(shares) - min(shares) > 0.05, "the sites have the same shares of the classes"
    for site in sites:
        assert 0.1 < site.test.float().mean() < 0.35
        assert len(site.labels[site.test].unique()) == 2
    again, _ = read_sites(settings(lr=1.0))
    assert all(torch.equal(one.pixels, other.pixels) for one, other in zip(sites, again, strict=True))
    other, _ = read_sites(settings(seed=1))
    assert [len(site.labels) for site in other] != sizes
    assert len(together(sites).labels) == 576


def test_folders_are_sites_and_their_classes_are_those_of_all(stripes):
    own = settings(site_data=f"{stripes},{stripes}")
    sites, classes = read_sites(own)
    assert (own.sites, classes) == (2, CLASSES)
    assert [len(site.labels) for site in sites] == [40, 40]
    site, classes = read_site("North", str(stripes), settings(classes="normal,down,across"))
    assert classes == ["normal", "down", "across"]
    assert site.labels.unique().tolist() == [1, 2]
    with pytest.raises(TrainerError, match="Site North has the class 'down', and the exchange across, up"):
        read_site("North", str(stripes), settings(classes="across,up"))
    with pytest.raises(TrainerError, match="set 'classes'"):
        read_site("North", str(stripes), settings())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rounds": 0}, "--rounds is 0"),
        ({"least": 4}, "--least is 4, and there are 3 sites"),
        ({"local": "neck"}, "--local has 'neck'"),
        ({"method": "ssf"}, "--average products is for --method lora alone"),
        ({"option": "dora=true"}, "DoRA's norm"),
        ({"round": 3}, "unexpected keyword argument 'round'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given, message):
    with pytest.raises(TrainerError, match=message):
        settings(**given)


def test_the_app_of_flower_has_every_setting_with_its_default():
    app = tomllib.loads((EXAMPLES / "pyproject.toml").read_text(encoding="utf-8"))
    assert app["tool"]["flwr"]["app"]["config"] == dataclasses.asdict(Settings())


def test_too_many_sites_for_the_patients_are_refused():
    with pytest.raises(
        TrainerError, match=f"no split has {FOLDS} patients of every class at each of 9 sites"
    ):
        read_sites(settings(sites=9))
