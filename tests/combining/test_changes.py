"""Each way to make one change of several, number by number."""

import pytest
import torch

from medpeft.combining.changes import Recipe

A = torch.tensor([4.0, -3.0, 0.5, 2.0, -1.0, 0.0])
B = torch.tensor([1.0, 5.0, -2.0, 0.1, -4.0, 0.0])
C = torch.tensor([-2.0, 0.2, -1.0, 3.0, 6.0, 0.0])


def test_a_sum_is_weighted():
    found = Recipe("sum", (1.0, -0.5), 1.0, 0).combine("x", [A, B])
    assert torch.equal(found, A.double() - 0.5 * B.double())


def test_ties_trims_elects_a_sign_and_takes_the_mean_of_those_that_have_it():
    # Half of six numbers: A keeps 4, -3, 2; B keeps 5, -2, -4; C keeps -2, 3, 6.
    # Signs of the sums: 4 - 2 > 0; -3 + 5 > 0; -2 < 0; 2 + 3 > 0; -4 + 6 > 0; none.
    found = Recipe("ties", (1.0, 0.5, 2.0), 0.5, 0).combine("x", [A, B, C])
    assert found.tolist() == [4.0, 2.5, -1.0, (2.0 + 6.0) / 2, 12.0, 0.0]


def test_a_change_of_weight_0_votes_and_counts_in_ties():
    found = Recipe("ties", (1.0, 0.0, 1.0), 0.5, 0).combine("x", [A, B, C])
    assert found.tolist() == [4.0, 0.0, 0.0, 2.5, 6.0, 0.0]  # The sign that B elects alone leaves its 0.
    found = Recipe("ties", (1.0, 0.0), 1.0, 0).combine("x", [A, A])
    assert torch.equal(found, A.double() / 2)


def test_ties_of_equal_weights_follows_the_paper_on_random_numbers():
    torch.manual_seed(0)
    changes = torch.randn(3, 7, 11, dtype=torch.float64)
    trimmed = torch.zeros_like(changes)
    for change, kept in zip(changes, trimmed, strict=True):
        least = change.abs().flatten().sort(descending=True).values[int(0.3 * 77) - 1]
        kept[change.abs() >= least] = change[change.abs() >= least]
    elected = torch.where(trimmed.sum(0) >= 0, 1.0, -1.0)
    expected = torch.zeros(7, 11, dtype=torch.float64)
    for place in torch.cartesian_prod(torch.arange(7), torch.arange(11)).tolist():
        agreeing = [t[tuple(place)] for t in trimmed if t[tuple(place)] * elected[tuple(place)] > 0]
        expected[tuple(place)] = 0.4 * sum(agreeing) / max(1, len(agreeing))
    found = Recipe("ties", (0.4, 0.4, 0.4), 0.3, 0).combine("x", list(changes))
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_dare_drops_a_random_part_enlarges_the_rest_and_keeps_the_mean():
    change = torch.ones(200_000)
    recipe = Recipe("dare", (1.0,), 0.25, 3)
    found = recipe.combine("x", [change])
    assert set(found.unique().tolist()) == {0.0, 4.0}
    assert found.mean().item() == pytest.approx(1.0, abs=0.02)
    assert torch.equal(found, recipe.combine("x", [change]))
    assert not torch.equal(found, recipe.combine("y", [change]))
    assert not torch.equal(found, Recipe("dare", (1.0,), 0.25, 4).combine("x", [change]))
    both = Recipe("dare", (1.0, 1.0), 0.25, 3).combine("x", [change, change])
    assert 2 * 0.25**2 < (both == 4).float().mean() < 0.5  # Each has a random part of its own.


@pytest.mark.parametrize("how", ["sum", "dare"])
def test_all_of_each_change_is_the_sum(how):
    assert torch.equal(Recipe(how, (2.0, 1.0), 1.0, 0).combine("x", [A, B]), 2 * A.double() + B.double())


def test_what_is_empty_stays_empty():
    for how in ("sum", "ties", "dare"):
        assert Recipe(how, (1.0,), 0.5, 0).combine("x", [torch.zeros(0, 3)]).shape == (0, 3)
