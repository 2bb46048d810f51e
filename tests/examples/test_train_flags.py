"""Flags, from the command line and from a file, are read with their types, and wrong ones answered with what to do."""

import pytest
import train
from small_training import TINY, messages
from trainer.flags import make_parser, parse, read_options

import medpeft


def test_options_are_read_with_their_types():
    pairs = ["rank=4", "alpha=0.5", "dora=True", "rslora=false", "init=pissa", "x=none"]
    assert read_options("lora", pairs) == {
        "lora": {
            "rank": 4,
            "alpha": 0.5,
            "dora": True,
            "rslora": False,
            "init": "pissa",
            "x": None,
        }
    }


def test_options_of_a_union_name_their_method():
    assert read_options("lora+ssf", ["lora.rank=4"]) == {"lora": {"rank": 4}, "ssf": {}}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--option", "rank"], "--option rank is not of the form NAME=VALUE"),
        (["--method", "lora+ssf", "--option", "rank=4"], "Say for which: --option lora.rank=4"),
        (["--option", "lora.rank=4"], "is for 'lora', and --method is ssf"),
        (["--k-folds", "1"], "--k-folds is 1 and --fold 0; take at least 2 folds"),
        (["--k-folds", "-2"], "--k-folds is -2 and --fold 0; take at least 2 folds"),
        (["--k-folds", "3", "--fold", "3"], "folds, numbered from 0"),
        (["--group-column", "sex"], "--group-column sex names a column, and --data None has none"),
        ([*TINY, "--cache-features"], "methods that train the head alone, and"),
        (["--train-fraction", "0"], "--train-fraction is 0.0; it must be above 0"),
        (["--epochs", "0"], "--epochs is 0; it must be at least 1"),
        (["--lr", "0"], "--lr is 0.0; it must be above 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--data", "nowhere"], "--data nowhere does not exist"),
        (["--test-fraction", "0.9"], "Their sum must stay below 1"),
        ([*TINY, "--method", "lra"], "Did you mean 'lora'?"),
        ([*TINY, "--option", "rnk=1"], "Unknown option 'rnk'"),
        ([*TINY, "--target", "nothing.*"], "nothing"),
    ],
)
def test_wrong_flags_are_answered_with_what_to_do(capsys, given, message):
    assert message in messages(capsys, *given)


def test_a_file_gives_flags_and_given_ones_win(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "method: lora\noption: {rank: 4, dora: true}\nlr: 0.02\nimage_size: 64\nclass-weights: true\ntarget: [a, b]"
    )
    args = parse(make_parser(""), ["--config", str(file), "--lr", "0.5", "--option", "rank=2"])
    assert (args.method, args.lr, args.image_size, args.class_weights) == ("lora", 0.5, 64, True)
    assert args.option == {"lora": {"rank": 2, "dora": True}}
    assert args.target == ["a", "b"]
    assert parse(make_parser(""), ["--config", str(file), "--target", "c"]).target == ["c"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "the key 'epoch', and train.py no flag --epoch. Did you mean 'epochs'?"),
        ("- lr", "holds a list. Write one flag a line"),
        ("class_weights: 1", "'class-weights' is 1; write true or false"),
        ("lr: [1, 2]", "'lr' is [1, 2]; one value is needed"),
        ("option: 3", "'option' is 3. Write a mapping"),
        ("{", "could not be read"),
    ],
)
def test_a_wrong_file_of_flags_is_answered_with_what_to_do(tmp_path, capsys, text, message):
    (tmp_path / "run.yaml").write_text(text)
    assert message in messages(capsys, "--config", tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("method", "rate"), [("ssf", 3e-3), ("full", 3e-4), ("bias+tsa", 3e-4), ("svdiff+bn", 3e-3)]
)
def test_a_union_takes_the_lowest_rate_of_its_parts(method, rate):
    assert parse(make_parser(""), ["--method", method]).lr == rate


def test_the_help_names_every_method(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    listed = " ".join(capsys.readouterr().out.split())
    assert ", ".join(medpeft.methods()) in listed
