"""Latents and texts are encoded once, and what comes back is what the encoders give."""

import pytest
import torch
from diffusion.cache import SHARD, embed, encode
from diffusion.captions import to_model
from diffusion.tiny import build_tiny
from small_diffusion import SIDE, captioned


@pytest.fixture(scope="module")
def pipeline():
    return build_tiny(["a light spot"], SIDE, seed=0)


def test_what_was_encoded_is_not_encoded_again(pipeline, tmp_path, monkeypatch):
    data = captioned(["a spot", "a light spot", "a spot"])
    first = encode(pipeline, data, tmp_path, torch.device("cpu"), batch_size=2)
    monkeypatch.setattr(type(pipeline.vae), "encode", lambda *_: pytest.fail("encoded again"))

    again = encode(pipeline, data, tmp_path, torch.device("cpu"))

    one, two = (e.batch([2, 0, 1], torch.Generator().manual_seed(0)) for e in (first, again))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1]["text"], two[1]["text"])


def test_a_batch_is_what_the_encoders_give(pipeline, tmp_path):
    data = captioned(["a spot", "a light spot"])
    encoded = encode(pipeline, data, tmp_path, torch.device("cpu"))
    latents, condition = encoded.batch([1, 0], torch.Generator().manual_seed(0))

    with torch.no_grad():
        posterior = pipeline.vae.encode(to_model(data.pixels([1, 0]))).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(0))
        assert torch.allclose(
            latents, (posterior.mean + posterior.std * noise) * pipeline.vae.config.scaling_factor, atol=1e-5
        )
        tokens = pipeline.tokenizer(["a light spot", ""], padding="max_length", return_tensors="pt").input_ids
        text, empty = pipeline.text_encoder(tokens).last_hidden_state
    assert torch.allclose(condition["text"][0], text, atol=1e-5)
    assert torch.allclose(encoded.empty["text"], empty, atol=1e-5)


def test_other_texts_images_and_weights_have_shards_of_their_own(pipeline, tmp_path):
    def shard(data, pipeline=pipeline):
        return encode(pipeline, data, tmp_path, torch.device("cpu")).shards[0].name

    other = build_tiny(["a light spot"], SIDE, seed=1)
    found = [
        shard(captioned(["x"])),
        shard(captioned(["y"])),
        shard(captioned(["x"], seed=1)),
        shard(captioned(["x"]), other),
    ]

    assert len(set(found)) == 4


def test_shards_hold_so_many_images_each(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusion.cache.SHARD", 2)
    data = captioned(["x", "y", "z"])
    encoded = encode(pipeline, data, tmp_path, torch.device("cpu"))

    assert len(encoded.shards) == 2
    z = embed(pipeline, ["z"], torch.device("cpu"))[0]["text"]
    assert torch.allclose(encoded.batch([2], torch.Generator())[1]["text"], z, atol=1e-5)
    assert SHARD == 512
