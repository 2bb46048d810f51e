"""Wrong flags of the text-to-image scripts are answered with what to do."""

import copy

import generate as generate_script
import pytest
from diffusion.flags import make_parser, parse
from small_diffusion import SIDE, draw_spots, messages, save_pipeline


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return draw_spots(tmp_path_factory.mktemp("spots"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--pipeline", "nowhere", "--prompt", "x"], "--pipeline nowhere could not be opened"),
        (["--pipeline", "p", "--prompt", "x", "--no-base"], "leaves nothing to generate with"),
        (["--pipeline", "p", "--prompt", "x", "--images", "0"], "--images is 0"),
    ],
)
def test_wrong_flags_of_generate_are_answered_with_what_to_do(given, said, capsys):
    assert generate_script.main(given) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--new-class", "grey"], "--new-class grey is no class of the data, which have dark, light"),
        (["--new-class", "light", "--new-class", "dark"], "the tiny pipeline needs one to be pretrained on"),
        (["--new-class", "dark", "--held-out", "0.04"], "dark has no image in one part of the split"),
        (["--method", "lra"], "Did you mean 'lora'?"),
        (["--pipeline", "nowhere"], "--pipeline nowhere could not be opened"),
        (["--steps", "0"], "--steps is 0"),
        (["--held-out", "1"], "--held-out is 1.0"),
        (["--lr", "-1"], "--lr is -1.0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--data", "nowhere.csv"], "nowhere.csv does not exist"),
    ],
)
def test_wrong_flags_are_answered_with_what_to_do(more, said, data, folder, tmp_path, capsys):
    pipeline = [] if "--new-class" in more else ["--pipeline", folder]
    assert said in messages(
        capsys, "--data", data, "--image-size", SIDE, "--output", tmp_path, *pipeline, *more
    )


def test_another_kind_of_pipeline_is_refused_by_name(tmp_path, capsys):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, **blocks
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)

    assert "is a DDPMPipeline; this example trains those of Stable Diffusion" in messages(
        capsys, "--pipeline", tmp_path
    )


def test_attention_means_the_study_s_blocks_unless_said_otherwise():
    assert parse(make_parser(""), ["--method", "bias+attention"]).option == {
        "bias": {},
        "attention": {"scope": "block"},
    }
    given = ["--method", "attention", "--option", "scope=layer"]
    assert copy.deepcopy(parse(make_parser(""), given).option) == {"attention": {"scope": "layer"}}
