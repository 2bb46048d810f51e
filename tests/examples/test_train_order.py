"""The order of the images follows from seed and epoch: each once an epoch, from any step on, on however many processes."""

import numpy as np
import pytest
from trainer.order import FILLER, Order, balanced, step_seed


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_all_processes_together_see_each_step_of_one(world, accumulate):
    alone = Order(37, 8, seed=3)
    alone.begin(2)
    steps = list(alone)
    assert [len(step) for step in steps] == [8, 8, 8, 8, 5]
    shares = []
    for rank in range(world):
        order = Order(37, 8, 3, accumulate, rank, world)
        order.begin(2)
        shares.append(list(order))
    assert len({len(share) for share in shares}) == 1
    whole_steps = len(shares[0]) // accumulate
    for step in range(whole_steps):
        seen = [
            key
            for share in shares
            for part in share[step * accumulate : (step + 1) * accumulate]
            for key in part
        ]
        counted = [key for key in seen if key[1] != FILLER]
        assert sorted(counted) == sorted(steps[step])
        assert sorted(place for place, _ in counted) == sorted(alone.images(step).tolist())


def test_an_epoch_shows_every_image_once_and_the_next_in_another_order():
    order = Order(20, 4, seed=0)
    first = [key for batch in order for key in batch]
    order.begin(2)
    second = [key for batch in order for key in batch]
    assert sorted(place for place, _ in first) == list(range(20))
    assert [place for place, _ in first] != [place for place, _ in second]
    assert len({seed for _, seed in first + second}) == 40


def test_an_order_begins_at_any_step():
    order = Order(20, 4, seed=0)
    every = list(order)
    order.begin(1, step=3)
    assert list(order) == every[3:]
    assert len(order) == 2


@pytest.mark.parametrize(("count", "steps"), [(9, 2), (10, 3), (1, 1), (8, 2)])
def test_a_last_step_of_one_image_is_left_out(count, steps):
    order = Order(count, 4, seed=0)
    assert len(order) == len(list(order)) == steps


def test_a_last_step_too_small_for_all_processes_is_filled_up():
    shares = [list(Order(11, 8, seed=0, world=2, rank=rank)) for rank in (0, 1)]
    last = [share[-1] for share in shares]
    assert [len(part) for part in last] == [2, 2]
    assert [seed == FILLER for part in last for _, seed in part] == [False, False, False, True]


def test_a_balanced_order_draws_every_class_as_often():
    labels = np.repeat([0, 1, 2], [1600, 300, 100])
    order = Order(2000, 100, seed=0, balance=balanced(labels))
    places = [place for batch in order for place, _ in batch]
    assert np.bincount(labels[places]) / 2000 == pytest.approx([1 / 3] * 3, abs=0.03)


def test_every_step_and_process_draws_its_own_dropout():
    seeds = {
        step_seed(seed, epoch, step, rank)
        for seed in (0, 1)
        for epoch in (1, 2)
        for step in range(5)
        for rank in (0, 1)
    }
    assert len(seeds) == 40
