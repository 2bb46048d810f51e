"""The parts of the text-to-image example: texts, cached latents, the loss, the average of the weights, FID and KID."""

import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from torch import nn

import medpeft

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from diffusion import scores
from diffusion.cache import SHARD, embed, encode
from diffusion.captions import Captioned, halves, hold_out, read_captioned, tissue, to_model, to_pixels, within_tokens
from diffusion.loop import Average, Recipe, denoising_loss, rows_of, weights
from diffusion.scores import find_extractor, score
from diffusion.tiny import build_tiny, make_tokenizer
from trainer.errors import TrainerError

SIDE = 16


def image(path, shape=(20, 30), value=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(shape, value, np.uint8)).save(path)


def captioned(texts, seed=0):
    pixels = torch.randint(0, 256, (len(texts), 3, SIDE, SIDE), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    return Captioned(pixels, list(texts), list(texts), np.arange(len(texts)), SIDE)


# Texts


@pytest.mark.parametrize("where", ["table", "folder"])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_table_gives_each_image_its_text(kind, where, tmp_path):
    image(tmp_path / "a.png")
    image(tmp_path / "scans" / "b.png", (40, 40, 3), 7)
    rows = [("a.png", "no finding", "p1", "normal"), ("scans/b.png", "a mass", "p1", "")]
    table = tmp_path / f"metadata.{kind}"
    if kind == "csv":
        table.write_text("\ufefffile,text,patient,label\n" + "\n".join(",".join(row) for row in rows))
    else:
        names = ("file_name", "text", "patient", "label")
        table.write_text("\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in rows))

    found = read_captioned(table if where == "table" else tmp_path, 8, "{}")

    assert found.texts == ["no finding", "a mass"]
    assert found.classes == ["normal", "a mass"]
    assert found.groups[0] == found.groups[1]
    assert torch.equal(found.pixels([0, 1]), torch.tensor([100, 7], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 8, 8))


def test_folders_make_texts_of_the_names_of_classes(tmp_path):
    image(tmp_path / "benign" / "1.png")
    image(tmp_path / "not_benign" / "2.png")
    found = read_captioned(tmp_path, 8, "breast ultrasound, {}")
    assert found.texts == ["breast ultrasound, benign", "breast ultrasound, not benign"]
    assert found.prompts(1) == ["breast ultrasound, benign"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "file,caption\nx.png,y", "Name the image files in one of file_name, file, path, image, and what they show"),
        ("a.csv", "file,text\nx.png,y", "names 1 images that do not exist, the first is"),
        ("a.csv", "file,text\nx.png,", "1 rows without a file or a text, the first is row 1"),
        ("a.csv", "file,text\n", "has nothing"),
        ("a.jsonl", "{", "cannot be read as a table"),
        ("a.jsonl", "[1]", "a line that is no JSON object"),
        ("a.jsonl", "", "has nothing"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_with_the_reason(name, content, said, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(TrainerError) as caught:
        read_captioned(tmp_path / name, 8, "{}")
    assert said in str(caught.value)


def test_a_folder_without_images_and_a_caption_without_a_place_are_refused(tmp_path):
    (tmp_path / "benign").mkdir()
    with pytest.raises(TrainerError, match="neither metadata"):
        read_captioned(tmp_path, 8, "{}")
    with pytest.raises(TrainerError, match=r"has no \{\} where"):
        read_captioned(tmp_path, 8, "an image")


def test_texts_are_kept_by_their_number_of_tokens():
    data = captioned(["a", "a b c", "a b c d e"])
    tokenizer = make_tokenizer(data.texts)

    assert within_tokens(data, tokenizer, 5, 6).texts == ["a b c"]
    with pytest.raises(TrainerError, match="No text has 20 to 77 tokens: they have 3 to 7"):
        within_tokens(data, tokenizer, 20, 77)


def test_a_held_out_part_shares_no_group_with_the_rest():
    data = captioned(["x"] * 30)
    data.groups = np.arange(30) // 3

    train, held = hold_out(data, 0.3, seed=1)

    assert set(train.groups) | set(held.groups) == set(range(10))
    assert not set(train.groups) & set(held.groups)
    assert 0 < len(held) < len(train)
    assert torch.equal(held.images, data.images[[i for i in range(30) if data.groups[i] in set(held.groups)]])


def test_one_group_cannot_be_divided_and_one_class_not_halved():
    data = captioned(["x", "x"])
    data.groups[:] = 0
    with pytest.raises(TrainerError, match="cannot be divided"):
        hold_out(data, 0.5, 0)
    with pytest.raises(TrainerError, match="only the class 'x'"):
        halves(data)


def test_tissue_is_graded_by_its_stain():
    data = tissue(SIDE)

    assert halves(data) == (["no staining", "weak staining"], ["moderate staining", "strong staining"])
    assert {data.classes.count(name) for name in data.classes} == {400}
    blue = [float(data.of([name]).pixels(range(400))[:, 2].float().mean()) for half in halves(data) for name in half]
    assert blue == sorted(blue, reverse=True), "brown absorbs blue"


def test_pixels_reach_the_model_and_come_back():
    pixels = captioned(["x"]).pixels([0])
    assert float(to_model(pixels).min()) >= -1
    assert torch.equal(to_pixels(to_model(pixels) / 2 + 0.5), pixels)


# Cached latents


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
        assert torch.allclose(latents, (posterior.mean + posterior.std * noise) * pipeline.vae.config.scaling_factor, atol=1e-5)
        tokens = pipeline.tokenizer(["a light spot", ""], padding="max_length", return_tensors="pt").input_ids
        text, empty = pipeline.text_encoder(tokens).last_hidden_state
    assert torch.allclose(condition["text"][0], text, atol=1e-5)
    assert torch.allclose(encoded.empty["text"], empty, atol=1e-5)


def test_other_texts_images_and_weights_have_shards_of_their_own(pipeline, tmp_path):
    def shard(data, pipeline=pipeline):
        return encode(pipeline, data, tmp_path, torch.device("cpu")).shards[0].name

    other = build_tiny(["a light spot"], SIDE, seed=1)
    found = [shard(captioned(["x"])), shard(captioned(["y"])), shard(captioned(["x"], seed=1)), shard(captioned(["x"]), other)]

    assert len(set(found)) == 4


def test_shards_hold_so_many_images_each(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusion.cache.SHARD", 2)
    data = captioned(["x", "y", "z"])
    encoded = encode(pipeline, data, tmp_path, torch.device("cpu"))

    assert len(encoded.shards) == 2
    z = embed(pipeline, ["z"], torch.device("cpu"))[0]["text"]
    assert torch.allclose(encoded.batch([2], torch.Generator())[1]["text"], z, atol=1e-5)
    assert SHARD == 512


# The loss


def test_min_snr_bounds_the_weight_of_early_times():
    kept = torch.tensor([0.99, 0.5, 0.01], dtype=torch.float64)
    snr = torch.tensor([99.0, 1.0, 1 / 99], dtype=torch.float64)

    assert torch.allclose(weights(kept, 5.0, velocity=False), torch.tensor([5 / 99, 1.0, 1.0], dtype=torch.float64))
    assert torch.allclose(weights(kept, 5.0, velocity=True), torch.minimum(snr, torch.tensor(5.0)) / (snr + 1))
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


# FID and KID


class Means(nn.Module):
    """Three features of an image: the means of its channels."""

    num_features = 3

    def forward(self, images):
        return images.float().mean((2, 3)) / 255


def cloud(count, seed, shift=0.0):
    values = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed)) * 20 + 100 + shift
    return values.round().clamp(0, 255).to(torch.uint8).view(count, 3, 1, 1).expand(count, 3, 4, 4)


def test_fid_is_the_frechet_distance_of_the_features():
    real, generated = cloud(60, 0), cloud(50, 1, 40.0)
    found = score(real, generated, ("means", Means()))

    a, b = (Means()(images).double().numpy() for images in (real, generated))
    root = sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert found.fid == pytest.approx(expected, rel=1e-3)
    assert found.kid > 3 * found.kid_std > 0
    assert abs(score(real, cloud(50, 2), ("means", Means())).kid) < found.kid / 20


def test_a_score_names_its_extractor_and_warns_of_few_images():
    found = score(cloud(10, 0), cloud(12, 1), ("means", Means()))

    assert "means; 10 real and 12 generated images" in str(found)
    assert "10 images are too few for an FID" in found.warning
    assert "singular" not in found.warning
    assert "singular" in score(cloud(3, 0), cloud(3, 1), ("means", Means())).warning
    found.real = found.generated = 5000
    assert found.warning == ""


def test_one_image_cannot_be_scored():
    with pytest.raises(TrainerError, match="1 real and 5 generated images cannot be compared"):
        score(cloud(1, 0), cloud(5, 1), ("means", Means()))


def test_scoring_waits_for_no_other_process(tmp_path, monkeypatch):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        monkeypatch.setattr("torchmetrics.Metric._sync_dist", lambda *_, **__: pytest.fail("waited"))
        assert np.isfinite(score(cloud(5, 0), cloud(5, 1), ("means", Means())).fid)
    finally:
        torch.distributed.destroy_process_group()


def test_without_inception_s_weights_the_extractor_is_declared(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    name, network = find_extractor()

    assert "EfficientNet-Lite0" in name
    assert "not Inception" in name
    images = cloud(3, 0)
    with torch.no_grad():
        features = network(images)
    assert features.shape == (3, network.num_features)
    assert torch.allclose(features[:1], network(images[:1]), atol=1e-4)


def test_weights_of_inception_that_do_not_load_are_refused_where_they_were_named(tmp_path):
    (tmp_path / "inception.pth").write_text("no weights")
    with pytest.raises(TrainerError, match=r"--inception-weights .* cannot be used"):
        find_extractor(tmp_path / "inception.pth")


def test_inception_is_taken_where_its_weights_are_at_hand(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / scores.INCEPTION).write_text("")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    loaded = SimpleNamespace()
    monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", lambda *args: loaded)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_extractor() == ("Inception-v3, FID's weights, 2048 features", loaded)
    assert loaded.num_features == 2048
