"""Wrong settings of the text-to-image scripts are answered with what to do."""

import runpy
import sys

import generate as generate_script
import pytest
import yaml
from places import ROOT
from small_diffusion import SIDE, messages, settings


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--pipeline", "nowhere", "--prompt", "x"], "--pipeline nowhere could not be opened"),
        (["--pipeline", "p", "--prompt", "x", "--images", "0"], "images"),
        (["--pipeline", "p"], "prompt"),
    ],
)
def test_wrong_settings_of_generate_are_answered_with_what_to_do(given, said, capsys):
    assert generate_script.main(given) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--new_class", "grey"], "--new_class grey: the data have the classes dark, light"),
        (["--new_class", "[light, dark]"], "The tiny pipeline needs a class to be pretrained on"),
        (["--new_class", "dark", "--held_out", "0.04"], "dark has no image in one part of the split"),
        (["--method", "lra"], "Did you mean 'lora'?"),
        (["--method", "bias+lora", "--option.rank=4"], "Write --option.bias.rank"),
        (["--pipeline", "nowhere"], "--pipeline nowhere could not be opened"),
        (["--steps", "0"], '"steps"'),
        (["--held_out", "1"], '"held_out"'),
        (["--lr", "-1"], '"lr"'),
        (["--seed", "-1"], '"seed"'),
        (["--weight_decay", "-1"], '"weight_decay"'),
        (["--precision", "8"], "precision"),
        (["--stepz", "1"], "stepz"),
        (["--data", "nowhere"], "--data nowhere cannot be read"),
    ],
)
def test_wrong_settings_are_answered_with_what_to_do(more, said, spots, tiny_pipeline, tmp_path, capsys):
    pipeline = [] if "--new_class" in more else ["--pipeline", tiny_pipeline]
    output = tmp_path / "run"
    given = ["--data", spots, "--image_size", SIDE, "--output", output, *pipeline, *more]
    assert said in messages(capsys, *given)
    assert not output.exists()


@pytest.mark.parametrize("more", [["--method", "lra"], ["--option.rank=-1"], ["--target", "nowhere"]])
def test_a_wrong_method_is_refused_before_anything_is_read_or_pretrained(more, tmp_path, capsys):
    said = messages(capsys, "--data", tmp_path / "none", "--output", tmp_path / "run", *more)
    assert "cannot be read" not in said
    assert list(tmp_path.iterdir()) == []


def test_another_kind_of_pipeline_is_refused_by_name(tmp_path, capsys):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    sizes = {"sample_size": 8, "block_out_channels": (8,), "norm_num_groups": 4, "layers_per_block": 1}
    DDPMPipeline(UNet2DModel(**sizes, **blocks), DDPMScheduler()).save_pretrained(tmp_path)

    said = messages(capsys, "--pipeline", tmp_path)

    assert "is a DDPMPipeline; this example trains those of Stable Diffusion" in said


def test_attention_means_the_study_s_blocks_unless_said_otherwise():
    assert settings("--method", "bias+attention").methods == {"bias": {}, "attention": {"scope": "block"}}
    assert settings("--method", "attention", "--option.scope=layer").methods == {
        "attention": {"scope": "layer"}
    }


def test_options_reach_their_method():
    assert settings("--option.rank=4", "--option.parts=qkvo").methods == {
        "lora": {"rank": 4, "parts": "qkvo"}
    }
    given = settings("--method", "bias+lora", "--option.lora={rank: 4, dora: true}")
    assert given.methods == {"bias": {}, "lora": {"rank": 4, "dora": True}}
    given = settings("--method", "bias+lora", "--option.lora.rank=4")
    assert given.methods == {"bias": {}, "lora": {"rank": 4}}


def test_a_folder_is_named_by_what_the_adapter_depends_on():
    usual = settings().folder
    assert usual.name.startswith("tissue-tiny-lora-0-")
    assert settings("--score_samples", 9, "--cache", "x").folder == usual
    for more in (("--lr", 0.5), ("--option.rank=2",), ("--steps", 7)):
        assert settings(*more).folder != usual
    assert settings("--method", "bias+lora").rate == settings().rate < settings("--method", "bias").rate


def test_the_settings_of_a_run_are_settings_for_another(tmp_path):
    given = settings("--method", "bias+lora", "--option.lora.rank=4", "--prompt", "a, b", "--tokens=[7,77]")
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(given.plain))

    again = settings("--config", tmp_path / "settings.yaml")

    assert (again.plain, again.methods) == (given.plain, given.methods)


def test_help_shows_the_commands_as_they_are_written_and_a_line_for_each_setting(capsys):
    with pytest.raises(SystemExit):
        generate_script.main(["--help"])
    said = capsys.readouterr().out
    assert "\n    python examples/generate.py --pipeline" in said
    for name in generate_script.Settings.__dataclass_fields__:
        assert f"--{name}" in said
    assert "Fold the adapters into the weights first" in said


@pytest.mark.parametrize("script", ["text_to_image.py", "generate.py"])
def test_a_library_that_is_not_installed_is_named_with_its_remedy(script, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusion.data", None)
    with pytest.raises(
        SystemExit, match=rf"{script}: .* is not installed. Run: pip install -e '.\[diffusion\]'"
    ):
        runpy.run_path(str(ROOT / "examples" / script))
