"""Settings, from the command line and from a file, are read with their types, and wrong ones answered with what to do."""

from dataclasses import dataclass

import pytest
import train
from small_training import TINY, checked, messages, parsed
from trainer.errors import TrainerError
from trainer.flags import options_of, read_value, spelled
from trainer.settings import Settings

import medpeft


def test_options_are_read_with_their_types():
    pairs = ["rank=4", "alpha=0.5", "dora=True", "rslora=false", "init=pissa", "x=none"]
    words = [word for pair in pairs for word in ("--option", pair)]
    assert parsed("--method", "lora", *words).checked().option == {
        "lora": {"rank": 4, "alpha": 0.5, "dora": True, "rslora": False, "init": "pissa", "x": None}
    }


def test_options_of_a_union_name_their_method():
    words = ["--option", "lora.rank=4", "--option", "lora.alpha=8", "--option=ssf.sites=linear"]
    found = parsed("--method", "lora + ssf", *words).checked()
    assert found.option == {"lora": {"rank": 4, "alpha": 8}, "ssf": {"sites": "linear"}}
    assert found.checked() == found
    with pytest.raises(
        TrainerError, match=r"could be for any of lora, ssf\. Say for which: --option lora\.rank=4"
    ):
        options_of("lora+ssf", {"rank": "4"})
    by_place = {"attention": 16, "*": 4}
    assert options_of("lora", {"rank": by_place}) == options_of("lora", {"rank": str(by_place)})
    assert options_of("lora+ssf", {"lora": {"rank": by_place}})["lora"] == {"rank": by_place}
    with pytest.raises(TrainerError, match=r"--option bn\.x is for 'bn', and --method is lora"):
        options_of("lora", {"bn.x": "1"})


def test_flags_are_spelled_as_the_settings():
    words = [
        "--image-size",
        "64",
        "--quiet",
        "--compile",
        "false",
        "--target",
        "a",
        "--target=b",
        "--lr=1e-3",
    ]
    assert spelled(words, Settings) == [
        "--image_size", "64", "--quiet=true", "--compile", "false", "--target+=a", "--target+=b", "--lr=1e-3"
    ]  # fmt: skip
    assert parsed(*words).target == ["a", "b"]
    assert read_value("[1, 2]") == [1, 2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--epochs", "0"], "--epochs is 0; it must be above 0"),
        (["--image-size", "1"], "--image-size is 1; it must be at least 8"),
        (["--lr", "-1"], "--lr is -1.0; it must be above 0"),
        (["--lr", "1e9"], "a rate above 10 cannot be meant"),
        (["--weight-decay", "-1"], "--weight-decay is -1.0; it must be at least 0"),
        (["--train-fraction", "1.5"], "--train-fraction is 1.5; it must be above 0 and at most 1"),
        (["--warmup", "1"], "--warmup is 1.0"),
        (["--num-workers", "-1"], "--num-workers is -1"),
        (["--k-folds", "1"], "--k-folds is 1 and --fold 0; take at least 2 folds"),
        (["--k-folds", "3", "--fold", "3"], "--k-folds is 3 and --fold 3"),
        (["--fold", "1"], "--k-folds is 0 and --fold 1"),
        (["--seed", "-1"], "--seed is -1; it must be from 0 to 999999"),
        (["--option", "rank"], "--option rank is not of the form NAME=VALUE"),
        (["--model-option", "depth"], "--model-option depth is not of the form NAME=VALUE"),
        (["--data", "nowhere"], "--data nowhere does not exist"),
        (["--test-fraction", "0.9"], "Their sum must stay below 1"),
        (["--precision", "16-mixed", "--accelerator", "cpu"], "--precision 16-mixed needs a CUDA GPU"),
        (["--accumulate", "3"], "does not divide by --accumulate 3 × 1 devices"),
        (["--accumulate", "0"], "--accumulate is 0; it must be above 0"),
        (["--strategy", "ddp"], "--strategy ddp is for several devices"),
        (["--class-weights", "--balanced-sampler"], "weight rare classes twice"),
        (["--patient-column", "case"], "--patient-column case names a column, and --data None has none"),
        (
            ["--task", "multilabel", "--data", "hf:x", "--finding-column", "mass"],
            "--finding-column ['mass'] names a column, and of --data hf:x label-column, patient-column and",
        ),
        (["--group-column", "sex"], "--group-column sex names a column"),
        (["--test-data", "."], "--test-data needs --data"),
        (["--data", ".", "--test-data", ".", "--k-folds", "3"], "--test-data is the test. Leave one out"),
        (["--data", ".", "--test-data", ".", "--test-fraction", "0.3"], "has no use beside --test-data"),
        (
            ["--cache-features", "x", "--augment", "light"],
            "--augment light needs several views of each image",
        ),
        (["--views", "8", "--augment", "none"], "--views 8 of an image are all the same with --augment none"),
        (["--views", "0"], "--views is 0; it must be at least 1"),
        (["--depth", "1.5"], "--depth is 1.5; it must be above 0 and at most 1"),
        (["--model", "torchvision:alexnet", "--no-pretrained", "--depth", "0.5"], "none is known"),
        (["--feature-dtype", "float16"], "--feature-dtype float16 is for --cache-features"),
        (["--memory", "6"], "--memory 6 is no size of a memory, such as 6GiB"),
        (["--memory", "0.0GB"], "--memory 0.0GB is no size of a memory"),
        ([*TINY, "--memory", "1kB"], "Nothing fits into --memory 1kB"),
        (["--cache-features", "x", "--devices", "2"], "on one device"),
        ([*TINY, "--cache-features", "x", "--method", "full"], "there is nothing to compute once"),
        (["--cache-features", __file__], "is a file. Name a folder"),
        (["--output", __file__], "is a file. Name a folder"),
        ([*TINY, "--method", "lra"], "Did you mean 'lora'?"),
        ([*TINY, "--option", "rnk=1"], "Unknown option 'rnk'"),
        ([*TINY, "--target", "nothing.*"], "nothing"),
        (["--model", "monai:DenseNet121"], "has no pretrained weights. Add --no-pretrained"),
    ],
)
def test_wrong_settings_are_answered_before_an_image_is_read(capsys, monkeypatch, given, message):
    monkeypatch.setattr("trainer.work.read_data", None)
    assert message in messages(capsys, *given)


@pytest.mark.parametrize(
    "given", [["--no-such", "3"], ["--augment", "much"], ["--lr", "fast"], ["--quiet", "maybe"]]
)
def test_flags_that_do_not_exist_or_have_another_type_end_with_a_usage(capsys, given):
    with pytest.raises(SystemExit) as raised:
        train.main(given)
    assert raised.value.code == 2
    assert given[0].strip("-").replace("-", "_") in capsys.readouterr().err


def test_a_file_gives_settings_and_flags_win(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "method: lora\noption: {rank: 4, dora: true}\nlr: 0.02\nimage_size: 64\nclass_weights: true\ntarget: [a, b]"
    )
    found = parsed("--config", file, "--lr", "0.5", "--option", "rank=2").checked()
    assert (found.method, found.lr, found.image_size, found.class_weights) == ("lora", 0.5, 64, True)
    assert found.option == {"lora": {"rank": 2, "dora": True}}
    assert found.target == ["a", "b"]


@pytest.mark.parametrize("text", ["epoch: 3", "- lr", "class_weights: 1", "lr: [1, 2]", "option: 3", "{"])
def test_a_wrong_file_of_settings_is_refused(tmp_path, capsys, text):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(SystemExit):
        train.main(["--config", str(tmp_path / "run.yaml")])
    key = text.partition(":")[0] if ":" in text else "config"
    assert key in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "rate"),
    [("ssf", 3e-3), ("full", 3e-4), ("bias+tsa", 3e-4), ("mona", 3e-4), ("svdiff+bn", 3e-3), ("lora", 1e-3)],
)
def test_a_union_takes_the_lowest_rate_of_its_parts(method, rate):
    assert checked(method=method).lr == rate


def test_the_help_says_what_every_setting_means(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for expected in (
        "--patient_column",
        "one patient's images stay in one part",
        "bias+norm",
        "default: 160",
    ):
        assert expected in shown


def test_a_setting_of_later_date_leaves_the_digests_as_they_are():
    @dataclass(kw_only=True)
    class Later(Settings):
        later: int = 1

    assert Later(lr=0.1).checked().digest() == checked(lr=0.1).digest()
    assert Later(lr=0.1, later=2).checked().digest() != checked(lr=0.1).digest()


def test_the_digest_names_what_the_result_depends_on(tmp_path):
    plain = checked()
    assert str(plain.output) == f"runs/tissue-tf_efficientnet_lite0-ssf-0-{plain.digest()}"
    for free in ({"output": tmp_path}, {"quiet": True}, {"num_workers": 2}, {"no_figures": True}):
        assert checked(**free).digest() == plain.digest()
    others = (
        {"option": {"sites": "conv"}},
        {"lr": 0.1},
        {"image_size": 64},
        {"seed": 1},
        {"train_fraction": 0.5},
    )
    assert len({checked(**one).digest() for one in others} | {plain.digest()}) == 6
    (tmp_path / "a" / "images").mkdir(parents=True)
    (tmp_path / "b" / "images").mkdir(parents=True)
    folders = {checked(data=str(tmp_path / site / "images")).output for site in "ab"}
    assert len(folders) == 2


def test_every_method_is_named_in_words():
    with pytest.raises(medpeft.MedpeftError, match="Did you mean 'lora'"):
        medpeft.plan(__import__("timm").create_model("test_resnet"), checked(method="lra").option)
