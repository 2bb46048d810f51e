"""Scores of masks equal those by hand, and an image without a structure spoils no mean."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_erosion
from trainer.files.structures import UNKNOWN
from trainer.judging.overlap import KEPT, dice_ce, distances, measure
from trainer.tasks import Outcome
from trainer.tasks.segment import Segment

RNG = np.random.default_rng(0)


def logits_of(labels, structures):
    """Logits that give labels back."""
    hot = torch.nn.functional.one_hot(labels.long(), structures + 1)
    return 9.0 * hot.movedim(-1, 1).float()


def task(names=("a", "b"), **more):
    details = {"values": [1, 2], "unit": "px", "dimensions": 2, "patch": None} | more
    return Segment(list(names)).informed(details)


def shapes(side, dimensions):
    """Two overlapping boxes."""
    truth = np.zeros((side,) * dimensions, dtype=bool)
    predicted = truth.copy()
    truth[(slice(2, side // 2),) * dimensions] = True
    predicted[(slice(3, side // 2 + 3),) * (dimensions - 1) + (slice(1, side // 2),)] = True
    return truth, predicted


def surface_distances(own, other, sides):
    """From each pixel of the edge of one to the nearest of the other's, by comparing all pairs."""
    edges = [np.argwhere(mask & ~binary_erosion(mask)) * np.array(sides) for mask in (own, other)]
    return np.sqrt(((edges[0][:, None] - edges[1][None]) ** 2).sum(-1)).min(1)


@pytest.mark.parametrize("sides", [(1.0, 1.0), (0.5, 2.0), (3.0, 1.0, 1.5)])
def test_distances_of_surfaces_equal_those_of_all_pairs(sides):
    truth, predicted = shapes(12, len(sides))
    there, back = (surface_distances(*pair, sides) for pair in ((predicted, truth), (truth, predicted)))
    planes = [torch.from_numpy(mask[None, None].astype(np.float32)) for mask in (predicted, truth)]
    hd95, surface = distances(*planes, sides)
    assert hd95.item() == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)))
    tolerance = max(1, *sides)
    near = (there <= tolerance).sum() + (back <= tolerance).sum()
    assert surface.item() == pytest.approx(near / (len(there) + len(back)))
    assert hd95.item() > 0
    assert 0 < surface.item() < 1


def test_dice_and_sizes_equal_those_by_hand():
    truth = torch.zeros(2, 4, 4, dtype=torch.uint8)
    truth[0, :2] = 1
    truth[0, 3] = 2
    predicted = torch.zeros(2, 4, 4, dtype=torch.uint8)
    predicted[0, 1] = 1
    predicted[1, 0, 0] = 2
    kept, sizes = measure(logits_of(predicted, 2), truth, torch.tensor([[2.0, 3.0], [1.0, 1.0]]), True)
    values = dict(zip(KEPT, kept.unbind(2), strict=True))
    assert values["dice"][0].tolist() == pytest.approx([2 * 4 / (8 + 4), 0])
    assert values["dice"][1].isnan().all()
    assert sizes.tolist() == [[48, 24], [0, 0]]
    assert values["size"].tolist() == [[24, 0], [0, 1]]
    # A structure that was missed has no distance, and its surface is nowhere near.
    assert math.isnan(values["hd95"][0, 1])
    assert values["surface_dice"][0, 1] == 0
    assert values["surface_dice"][1].isnan().all()


def test_loss_is_dice_of_the_structures_and_cross_entropy_of_all():
    logits, labels = torch.randn(3, 3, 5, 5), torch.randint(0, 3, (3, 5, 5))
    shares = logits.softmax(1)
    losses = []
    for image in range(3):
        for structure in (1, 2):
            truth, own = (labels[image] == structure).float(), shares[image, structure]
            losses.append(1 - (2 * (truth * own).sum() + 1e-5) / (truth.sum() + own.sum() + 1e-5))
    entropy = -torch.log(shares.gather(1, labels[:, None])).mean()
    assert dice_ce(logits, labels).item() == pytest.approx((sum(losses) / 6 + entropy).item(), rel=1e-5)
    kept, _ = measure(logits, labels.byte(), torch.ones(3, 2), surfaces=False)
    assert task().kept_loss(kept, kept, None).item() == pytest.approx(
        dice_ce(logits, labels).item(), rel=1e-5
    )


def test_the_mean_leaves_out_what_is_not_there_and_counts_mistakes():
    truth = torch.zeros(3, 8, 8, dtype=torch.uint8)
    truth[0, :4], truth[1, :4], truth[1, 4:] = 1, 1, 2
    predicted = truth.clone()
    predicted[1, 4:] = 0
    predicted[2, 0, 0] = 1
    outputs, targets = task().keep(logits_of(predicted, 2), (truth, torch.ones(3, 2)))
    scores = task().scores(Outcome(outputs, targets, {}))
    # The first structure has 1 in two images, the second 0 in one. The last image has none.
    assert scores["dice"] == 0.5
    assert scores["dice"] == pytest.approx(task().watch(outputs, targets))
    assert scores["dice_per_structure"] == [1, 0]
    assert (scores["images_with"], scores["missed"], scores["false_alarms"]) == ([2, 1], [0, 1], [1, 0])
    assert scores["images_without"] == 1
    rows = task().predictions(outputs, {})
    assert rows["dice"].tolist()[:2] == [1, 0.5]
    assert rows["dice"].isna().tolist() == [False, False, True]
    assert rows["area_px(a)"].tolist() == [32, 32, 1]
    assert task().truths(targets)["true_area_px(b)"].tolist() == [0, 32, 0]
    table = task().table(Outcome(outputs, targets, {}), scores)
    assert "1 images have no structure" in table
    assert "HD95                0.0000 px" in table


def test_nothing_is_scored_where_the_truth_is_not_known():
    labels = torch.full((1, 4, 4), UNKNOWN, dtype=torch.uint8)
    labels = torch.cat([labels, torch.ones(1, 4, 4, dtype=torch.uint8)])
    outputs, targets = task().keep(logits_of(torch.ones(2, 4, 4), 2), (labels, torch.ones(2, 2)))
    assert targets.isnan().tolist() == [[True, True], [False, False]]
    assert outputs[0, :, KEPT.index("dice")].isnan().all()
    assert outputs[0, 0, KEPT.index("size")] == 16
    assert outputs[1, 0, KEPT.index("dice")] == 1
    assert "dice" not in task().predictions(outputs[:1], {})


def test_logits_of_another_size_are_scored_on_the_grid_of_the_mask():
    truth = torch.zeros(1, 8, 8, dtype=torch.uint8)
    truth[:, :, 4:] = 1
    outputs, _ = task().keep(
        logits_of(truth.repeat_interleave(2, 1).repeat_interleave(2, 2), 2), (truth, torch.ones(1, 2))
    )
    assert outputs[0, 0, KEPT.index("dice")] == 1
    assert outputs[0, 0, KEPT.index("size")] == 32


def test_a_window_slides_over_images_that_are_larger_than_it():
    seen = []

    def network(images):
        seen.append(tuple(images.shape[1:]))
        return torch.cat([images[:, :1], 1 - images[:, :1]], 1)

    images = torch.rand(2, 3, 20, 20)
    outputs = task(names=["a"], patch=8).infer(network, images)
    assert set(seen) == {(3, 8, 8)}
    assert torch.allclose(outputs[:, 0], images[:, 0], atol=1e-5)
    assert torch.equal(task(names=["a"], patch=20).infer(network, images)[:, 0], images[:, 0])
