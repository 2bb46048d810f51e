"""The model card has what a run knows, marks what it cannot know, and counts CLAIM's items."""

import re
import shlex

import pytest
from small_training import draw_stripes, parsed, run
from trainer.results.card import command_of, markdown, write_card
from trainer.results.claim import ITEMS, answers, open_items
from trainer.settings import Settings
from trainer.tasks.classify import Classify

import medpeft


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = draw_stripes(tmp_path_factory.mktemp("stripes"))
    lines = ["path,label,patient,sex"]
    for i, path in enumerate(sorted(folder.glob("*/*.png"))):
        lines.append(f"{path},{path.parent.name},p{i // 2},{'fm'[i % 4 > 1]}")
    table = folder / "table.csv"
    table.write_text("\n".join(lines))
    output = tmp_path_factory.mktemp("parent") / "run"
    given = ["--data", table, "--group-column", "sex", "--model", "test_efficientnet", "--no-pretrained"]
    given += ["--image-size", 32, "--epochs", 2, "--method", "lora", "--option", "rank=2", "--quiet"]
    record = run(*given, "--output", output)
    return output, record, (output / "model-card.md").read_text()


def section(card, name):
    return re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", card, re.MULTILINE | re.DOTALL).group(1)


def test_the_card_counts_images_and_patients_of_each_part(finished):
    _, record, card = finished
    data = section(card, "Data")
    across = " | ".join(str(record["images"][part]["across"]) for part in ("train", "val", "test"))
    assert f"| across | {across} |" in data
    sizes = record["parts"]
    assert sum(part["images"] for part in sizes.values()) == 40
    assert sum(part["groups"] for part in sizes.values()) == 20
    groups = " | ".join(str(sizes[part]["groups"]) for part in ("train", "val", "test"))
    assert f"| groups | {groups} |" in data
    assert "No image had to be left out" in data
    assert "No group is in more than one part." in section(card, "Split")


def test_the_card_has_the_scores_with_their_intervals(finished):
    _, record, card = finished
    test = record["test"]
    low, high = test["intervals"]["macro_f1"]
    line = (
        f"| macro-F1 | {test['macro_f1']:.3f} | {low:.3f} to {high:.3f} | {record['val']['macro_f1']:.3f} |"
    )
    assert line in section(card, "Scores")
    point = test["operating"]["down"]
    assert f"| down | {point['threshold']:.3f} | {point['sensitivity']:.3f} (" in section(
        card, "Operating points"
    )
    assert f"{test['sets']['coverage']:.3f}" in section(card, "Conformal sets")
    assert f"{record['fitted']['temperature']:.3f}" in section(card, "Calibration")
    assert "The worst subgroup is" in section(card, "Subgroups")
    model = section(card, "Model")
    assert f"of which {record['trainable']:,} trained" in model
    assert "none, they began at random" in model


def test_tables_have_a_line_before_them_and_a_row_as_wide_as_their_head(finished):
    lines = finished[2].splitlines()
    for number, line in enumerate(lines):
        if line.startswith("|") and not lines[number - 1].startswith("|"):
            assert lines[number - 1] == "", line
            width = line.count("|")
            for row in lines[number:]:
                if not row.startswith("|"):
                    break
                assert row.count("|") == width, row
        if line.startswith("#") and number:
            assert lines[number - 1] == "", line


def test_what_only_the_user_knows_is_marked(finished):
    card = finished[2]
    assert card.count("**To be filled in by the user.**") >= 3
    assert "To be filled in" in section(card, "Intended use and limits")


def test_every_item_of_claim_is_answered_or_open(finished):
    _, _, card = finished
    claim = section(card, "CLAIM")
    numbers = re.findall(r"^\| (\d+) \| ", claim, re.MULTILINE)
    still_open = re.findall(r"^- \[ \] (\d+)\. ", claim, re.MULTILINE)
    assert sorted(map(int, numbers + still_open)) == list(range(1, 45))
    assert "30" in numbers  # subgroups
    assert "33" in still_open
    assert {"14", "36", "44"} <= set(still_open)


def test_another_site_answers_the_item_of_external_data():
    record = {
        "broken_images": ["x"],
        "divided_groups": 0,
        "weights": {"origin": "o"},
        "score": "s",
        "test": {},
    }
    found = answers(Settings(data="a", test_data="b"), record)
    assert "b" in found[33]
    assert 32 not in found
    assert 38 not in found
    assert "1 images that cannot be read" in found[12]
    assert len(found) + len(open_items(found)) == len(ITEMS) == 44


def test_the_command_gives_the_run_again(finished):
    _, record, card = finished
    command = command_of(Settings(**record["settings"]))
    assert command in card
    words = shlex.split(command)[2:]
    assert parsed(*words).checked().plain() == record["settings"]


def test_the_versions_and_the_licence_of_the_weights_are_told(finished):
    _, record, card = finished
    assert f"medpeft {medpeft.__version__}" in section(card, "To do it again")
    assert record["versions"]["timm"] in card


def test_a_card_without_subgroups_thresholds_or_mistakes_says_so(finished, tmp_path):
    _, record, _ = finished
    test = {name: value for name, value in record["test"].items() if name not in ("operating", "sets")}
    plain = {name: value for name, value in record.items() if not name.startswith("test_")}
    settings = Settings(**{**record["settings"], "output": tmp_path, "k_folds": 5})
    changed = {**plain, "test": test, "mistakes": [], "broken_images": ["torn.png"], "divided_groups": 2}
    write_card(settings, Classify(record["classes"]), changed)
    card = (tmp_path / "model-card.md").read_text()
    assert "None were scored: name a column" in card
    assert "None on the test." in card
    assert "1 images that cannot be read were left out" in card
    assert "Fold 0 of 5 is the test" in card
    assert "2 groups are in more than one part, so the scores flatter the model." in card
    for missing in ("## Operating points", "## Conformal sets"):
        assert missing not in card


def test_a_name_with_a_bar_does_not_break_a_table():
    import pandas as pd

    assert markdown(pd.DataFrame({"n": [1.5]}, index=["a|b"])).splitlines()[-1] == "| a b | 1.500 |"
