"""Each command as a process, once; what they print and how they fail, through `main`."""

import json
import os
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import medpeft
from medpeft.__main__ import main

ARCH = "test_vit2"


def command(*arguments):
    """Run `python -m medpeft` in a process of its own."""
    run = [sys.executable, "-m", "medpeft", *map(str, arguments)]
    return subprocess.run(run, capture_output=True, text=True, timeout=120, check=False)


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base for another task, an adapter trained on it, and the adapted model's outputs."""
    folder = tmp_path_factory.mktemp("files")
    base = randomised(timm.create_model(ARCH, num_classes=5))
    save_file(base.state_dict(), folder / "base.safetensors")
    base.reset_classifier(3)
    adapted = medpeft.apply(base, "lora", rank=4)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(
                    0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
                )
    medpeft.save(adapted, folder / "skin.safetensors", metadata={"classes": ["mel", "nev", "bcc"]})
    x = torch.rand(2, *adapted.pretrained_cfg["input_size"])
    return folder, x, adapted.eval()(x).detach()


def merging(folder, output):
    adapter, base = folder / "skin.safetensors", folder / "base.safetensors"
    return ["merge", str(adapter), "--arch", ARCH, "--base", str(base), "--output", str(output)]


def test_methods_lists_every_method_with_its_line():
    ran = command("methods")
    assert (ran.returncode, ran.stderr) == (0, "")
    names = [line.split()[0] for line in ran.stdout.splitlines()]
    assert names == list(medpeft.methods())


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"medpeft {medpeft.__version__}\n"


def test_the_help_explains_the_exit_codes(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "Exit codes:\n0  what was asked for holds" in capsys.readouterr().out


# Runs `python -m medpeft` once for each of its arguments, in a process each that need not import torch again.
FORKS = """
import os, runpy, sys
import medpeft
for arguments in sys.argv[1:]:
    if os.fork() == 0:
        sys.argv[1:] = arguments.split()
        runpy.run_module("medpeft", run_name="__main__", alter_sys=True)
    _, status = os.wait()
    if status:
        sys.exit(f"{arguments} ended with {status}")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork a process")
def test_a_reader_that_leaves_early_ends_a_command_quietly():
    commands = ["methods", "methods --json", "--help", "--version"]
    quiet = "ignore::DeprecationWarning:__main__"  # Newer versions of Python warn of a fork beside threads.
    run = [sys.executable, "-W", quiet, "-c", FORKS, *commands]
    process = subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    with process.stderr:
        said = process.stderr.read()
    assert (process.wait(timeout=120), said) == (0, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no device that is always full")
def test_a_full_disk_is_said_in_one_line():
    with open("/dev/full", "w") as full:
        run = [sys.executable, "-m", "medpeft", "methods"]
        ran = subprocess.run(run, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    assert ran.returncode == 1
    assert ran.stderr.startswith("medpeft: ")
    assert len(ran.stderr.splitlines()) == 1


def test_plan_prints_what_plan_says_as_json():
    ran = command("plan", ARCH, "lora+bias", "--option", "rank=4", "--num-classes", 3, "--json")
    assert (ran.returncode, ran.stderr) == (0, "")
    planned = medpeft.plan(timm.create_model(ARCH, num_classes=3), "lora+bias", rank=4)
    assert json.loads(ran.stdout)["trainable"] == planned.trainable
    assert json.loads(ran.stdout)["method"] == "lora+bias"


def test_check_fails_with_the_reason_and_no_traceback():
    ran = command("check", ARCH, "bn")
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith("medpeft: 'bn' found nothing to train in VisionTransformer")
    assert len(ran.stderr.splitlines()) == 1


def test_inspect_prints_the_header(files):
    ran = command("inspect", files[0] / "skin.safetensors")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "lora(" in ran.stdout
    assert "mel, nev, bcc" in ran.stdout


def test_merge_writes_a_plain_timm_checkpoint_that_computes_the_same(files, tmp_path):
    folder, x, wanted = files
    ran = command(*merging(folder, tmp_path / "plain.safetensors"))
    assert (ran.returncode, ran.stderr) == (0, "")
    plain = timm.create_model(ARCH, num_classes=3)
    plain.load_state_dict(load_file(tmp_path / "plain.safetensors"))
    torch.testing.assert_close(plain.eval()(x), wanted, rtol=1e-4, atol=1e-5)


def test_check_says_how_many_tensors_act(capsys):
    assert main(["check", ARCH, "lora", "--target", "attention"]) == 0
    assert "trainable tensors" in capsys.readouterr().out


def test_check_as_json_counts_them(capsys):
    assert main(["check", ARCH, "linear_probe", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"] == 2


def test_plan_takes_a_depth(capsys):
    assert main(["plan", ARCH, "bias", "--depth", "0.25", "--json"]) == 0
    planned = medpeft.plan(timm.create_model(ARCH, num_classes=2), "bias", depth=0.25)
    assert json.loads(capsys.readouterr().out)["trainable"] == planned.trainable


def test_plan_is_summed_up_by_method_and_type_of_layer(capsys):
    assert main(["plan", ARCH, "lora+norm"]) == 0
    *lines, total, note = capsys.readouterr().out.splitlines()
    planned = medpeft.plan(timm.create_model(ARCH, num_classes=2), "lora+norm")
    rows = [line.split() for line in lines[4:-1]]
    sites = len(planned.sites)
    assert rows[0][:4] == ["lora", str(sites), "places", "Linear"]
    assert [row[0] for row in rows] == ["lora", "norm", "head"]
    assert total.split() == ["total", f"{planned.trainable:,}"]
    assert note == "--layers lists every place"


def test_a_package_that_is_missing_is_named_with_the_way_to_get_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert main(["plan", ARCH, "lora"]) == 1
    assert "Install it: python -m pip install timm" in capsys.readouterr().err


def test_plan_is_an_aligned_table_with_a_total(capsys):
    assert main(["plan", ARCH, "ssf", "--layers", "--option", "sites=norm", "--exclude", "blocks.0.*"]) == 0
    *lines, total = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["method", "layer", "type", "parameters"]
    assert total.startswith("total")
    assert len({len(line) for line in (lines[2], lines[4], total)}) == 1


def test_options_are_read_as_values(capsys):
    assert (
        main(
            [
                "plan",
                ARCH,
                "lora",
                "--option",
                "rslora=true",
                "--option",
                "parts=qkv",
                "--option",
                "alpha=none",
            ]
        )
        == 0
    )
    assert "lora" in capsys.readouterr().out
    assert main(["plan", ARCH, "lora", "--option", "rank={'blocks.0': 8, '*': 2}"]) == 0
    assert "lora: rank 8 at blocks.0.attn.qkv, 2 at " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "test_vit22", "lora"], "has no architecture 'test_vit22'. Did you mean test_vit2"),
        (["plan", ARCH, "lra"], "Unknown method 'lra'. Did you mean 'lora'?"),
        (["plan", ARCH, "lora", "--option", "ranks=4"], "Unknown option 'ranks'. Did you mean 'rank'?"),
        (["plan", ARCH, "lora", "--option", "alpha=x"], "medpeft: "),
        (["plan", ARCH, "lora", "--target", "nowhere"], "'nowhere' picks no layer"),
        (["inspect", "nowhere.safetensors"], "nowhere.safetensors"),
    ],
)
def test_what_fails_is_said_on_stderr_with_code_1(arguments, said, capsys):
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("medpeft: ")
    assert said in printed.err
    assert "Traceback" not in printed.err


@pytest.mark.parametrize(
    "arguments", [[], ["plan", ARCH], ["plan", ARCH, "lora", "--option", "rank"], ["fly"]]
)
def test_what_cannot_be_understood_has_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: medpeft" in capsys.readouterr().err


def test_merge_refuses_weights_of_another_base_and_writes_nothing(files, tmp_path, capsys):
    folder, _, _ = files
    other = randomised(randomised(timm.create_model(ARCH, num_classes=5)))
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    arguments = merging(folder, tmp_path / "plain.safetensors")
    arguments[arguments.index("--base") + 1] = str(tmp_path / "other.safetensors")
    assert main(arguments) == 1
    assert "frozen tensors are not those of its base" in capsys.readouterr().err
    assert not (tmp_path / "plain.safetensors").exists()


def test_merge_names_what_another_architecture_lacks(files, tmp_path, capsys):
    arguments = merging(files[0], tmp_path / "plain.safetensors")
    arguments[arguments.index("--arch") + 1] = "test_resnet"
    assert main(arguments) == 1
    assert "does not hold the weights of test_resnet" in capsys.readouterr().err


def test_merge_refuses_a_file_that_is_none_of_medpefts(files, tmp_path, capsys):
    arguments = merging(files[0], tmp_path / "plain.safetensors")
    arguments[1] = str(files[0] / "base.safetensors")
    assert main(arguments) == 1
    assert "base.safetensors" in capsys.readouterr().err
