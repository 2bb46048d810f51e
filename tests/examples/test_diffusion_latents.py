"""Latents are computed once, and what comes back is what the autoencoder gives."""

import pytest
import torch
from diffusion import latents
from diffusion.data import pixels, to_model
from diffusion.latents import draw, encode
from diffusion.tiny import build_tiny
from small_diffusion import SIDE, captioned, draw_spots


@pytest.fixture(scope="module")
def vae():
    return build_tiny(["a light spot"], SIDE, seed=0).vae.eval()


def files(folder):
    return sorted(path.name for path in folder.glob("*.arrow"))


def test_what_was_encoded_is_not_encoded_again(vae, tmp_path, monkeypatch):
    data = captioned(["a spot", "a light spot", "a spot"])
    first = encode(vae, data, SIDE, tmp_path)
    monkeypatch.setattr(type(vae), "encode", lambda *_: pytest.fail("encoded again"))

    again = encode(vae, data, SIDE, tmp_path)

    assert list(again["text"]) == list(data["text"])
    assert all(torch.equal(first[[2, 0, 1]][name], again[[2, 0, 1]][name]) for name in ("mean", "deviation"))


def test_latents_are_what_the_autoencoder_gives(vae, tmp_path):
    data = captioned(["a spot", "a light spot"])
    found = draw(encode(vae, data, SIDE, tmp_path)[[1, 0]], vae, torch.Generator().manual_seed(0))

    with torch.no_grad():
        posterior = vae.encode(to_model(pixels(data[[1, 0]]["image"], SIDE))).latent_dist
    noise = torch.randn(posterior.mean.flatten(1).shape, generator=torch.Generator().manual_seed(0))
    drawn = posterior.mean + posterior.std * noise.view_as(posterior.mean)
    assert torch.allclose(found, drawn * vae.config.scaling_factor, atol=1e-5)


def test_other_texts_images_sizes_and_weights_have_files_of_their_own(vae, tmp_path):
    other = build_tiny(["a light spot"], SIDE, seed=1).vae
    for data in (captioned(["x"]), captioned(["y"]), captioned(["x"], seed=1)):
        encode(vae, data, SIDE, tmp_path)
    encode(other, captioned(["x"]), SIDE, tmp_path)
    encode(vae, captioned(["x"]), 2 * SIDE, tmp_path)

    assert len(files(tmp_path)) == 5


def test_a_file_that_changed_is_encoded_anew(vae, tmp_path):
    from diffusion.data import read_captioned

    draw_spots(tmp_path)
    encode(vae, read_captioned(tmp_path, "{}"), SIDE, tmp_path / "latents")
    (tmp_path / "0.png").write_bytes((tmp_path / "1.png").read_bytes())
    encode(vae, read_captioned(tmp_path, "{}"), SIDE, tmp_path / "latents")

    assert len(files(tmp_path / "latents")) == 2


def test_an_interrupted_run_goes_on_with_the_next_file(vae, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "SHARD", 2)
    data = captioned(["x", "y", "z"])
    encode(vae, data.select([0, 1]), SIDE, tmp_path)
    assert len(files(tmp_path)) == 1
    seen = []
    monkeypatch.setattr(latents, "pixels", lambda images, size: seen.extend(images) or pixels(images, size))

    found = encode(vae, data, SIDE, tmp_path)

    assert (len(seen), len(files(tmp_path))) == (1, 2)
    assert list(found["text"]) == ["x", "y", "z"]
