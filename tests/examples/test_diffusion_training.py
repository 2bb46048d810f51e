"""The loss, its weights, the order of the images and the average of the weights are those of their formulas."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusion.settings import Settings
from diffusion.training import denoising_loss, rows_of, start_training, trainable
from lightning.fabric import Fabric
from torch import nn

import medpeft


@pytest.mark.parametrize("gamma", [0.0, 5.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_zero_for_the_right_guess_and_the_weighted_square_for_another(prediction, gamma):
    noise = DDPMScheduler(prediction_type=prediction)
    latents, added = (torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    times = torch.tensor([10, 500, 990])
    share = noise.alphas_cumprod[times].view(3, 1, 1, 1)
    right = added if prediction == "epsilon" else share.sqrt() * added - (1 - share).sqrt() * latents
    seen = []

    def unet(noisy, *args, **kwargs):
        seen.append(noisy)
        return (right + len(seen) - 1,)

    assert denoising_loss(unet, noise, latents, {}, times, added, gamma) < 1e-10
    assert torch.allclose(seen[0], share.sqrt() * latents + (1 - share).sqrt() * added, atol=1e-6)
    # min-SNR: early times, whose signal is strong, weigh less.
    snr = (share / (1 - share)).flatten().double()
    weights = snr.clamp(max=gamma) / (snr if prediction == "epsilon" else snr + 1)
    expected = weights.mean() if gamma else torch.tensor(1.0)
    found = denoising_loss(unet, noise, latents, {}, times, added, gamma)
    assert torch.allclose(found.double(), expected.double(), atol=1e-5)


def test_every_image_comes_once_before_any_comes_again():
    rows = [row for step in range(6) for row in rows_of(12, 3, range(2 * step, 2 * step + 2))]

    assert sorted(rows) == list(range(12))
    assert rows != list(range(12))
    assert rows_of(12, 3, range(12, 24)) != rows


def test_the_average_holds_the_trainable_parameters_alone_and_is_put_in_for_a_while():
    model = medpeft.apply(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), "bias", head=None)
    fabric = Fabric(accelerator="cpu", devices=1)
    training = start_training(fabric, model, Settings(method="bias", ema=0.5))
    assert [p.shape for p in training.average.shadow_params] == [(3,), (2,)]
    start = model[0].bias.detach().clone()
    for _ in range(2):
        with torch.no_grad():
            model[0].bias.add_(1)
        training.average.step(trainable(model))

    # The first update forgets the initial values, the second keeps 2/11 of what is there.
    expected = (2 / 11) * (start + 1) + (1 - 2 / 11) * (start + 2)
    with training.averaged():
        assert torch.allclose(model[0].bias, expected)
    assert torch.equal(model[0].bias, start + 1 + 1)
