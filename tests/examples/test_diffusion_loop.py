"""The loss, its weights, the order of the images and the average of the weights are those of their formulas."""

import pytest
import torch
from diffusion.loop import Average, Recipe, denoising_loss, rows_of, weights
from torch import nn

import medpeft


def test_min_snr_bounds_the_weight_of_early_times():
    kept = torch.tensor([0.99, 0.5, 0.01], dtype=torch.float64)
    snr = torch.tensor([99.0, 1.0, 1 / 99], dtype=torch.float64)

    assert torch.allclose(
        weights(kept, 5.0, velocity=False), torch.tensor([5 / 99, 1.0, 1.0], dtype=torch.float64)
    )
    assert torch.allclose(
        weights(kept, 5.0, velocity=True), torch.minimum(snr, torch.tensor(5.0)) / (snr + 1)
    )
    assert torch.equal(weights(kept, 0, velocity=False), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_zero_for_the_right_guess_and_the_weighted_square_for_another(prediction):
    from diffusers import DDPMScheduler

    noise = DDPMScheduler(prediction_type=prediction)
    latents, added = (torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    times = torch.tensor([10, 500, 990])
    share = noise.alphas_cumprod[times].view(3, 1, 1, 1)
    right = added if prediction == "epsilon" else share.sqrt() * added - (1 - share).sqrt() * latents
    seen = []

    def unet(noisy, *args, **kwargs):
        seen.append(noisy)
        return (right + len(seen) - 1,)

    assert denoising_loss(unet, noise, latents, {}, times, added, 5.0) < 1e-10
    assert torch.allclose(seen[0], share.sqrt() * latents + (1 - share).sqrt() * added, atol=1e-6)
    expected = weights(noise.alphas_cumprod[times], 5.0, prediction != "epsilon").mean()
    assert torch.allclose(denoising_loss(unet, noise, latents, {}, times, added, 5.0), expected, atol=1e-5)


def test_every_image_comes_once_before_any_comes_again_on_any_number_of_devices():
    recipe = Recipe(steps=10, batch_size=2, seed=3)
    rows = [row for step in range(3) for rank in range(2) for row in rows_of(12, recipe, step, rank, 2)]

    assert sorted(rows) == list(range(12))
    assert rows != list(range(12))
    assert rows_of(12, recipe, 3, 0, 2) != rows[:2] or rows_of(12, recipe, 4, 0, 2) != rows[4:6]


def test_the_average_holds_the_trainable_parameters_alone_and_follows_them():
    model = medpeft.apply(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), "bias", head=None)
    average = Average(model, decay=0.5)
    assert set(average.values) == {"0.bias", "1.bias"}
    start = model[0].bias.detach().clone()
    with torch.no_grad():
        model[0].bias.add_(1)
    average.update(model)  # (1 + 1) / (10 + 1) of the old value in the first update
    with torch.no_grad():
        model[0].bias.add_(1)
    average.update(model)
    expected = (3 / 12) * (start + (1 - 2 / 11)) + (1 - 3 / 12) * (start + 2)
    assert torch.allclose(average.values["0.bias"], expected)

    with average.used(model):
        assert torch.equal(model[0].bias, average.values["0.bias"])
    assert torch.equal(model[0].bias, start + 1 + 1)
