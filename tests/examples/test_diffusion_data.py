"""Each image has its text, from metadata or from its folder, and a part held out shares no patient with the rest."""

import json

import numpy as np
import pytest
import torch
from diffusion.data import (
    hold_out,
    of_classes,
    pixels,
    read_captioned,
    tissue,
    to_model,
    to_pixels,
    within_tokens,
)
from diffusion.tiny import make_tokenizer
from PIL import Image
from small_diffusion import SIDE, captioned
from trainer.errors import TrainerError

# datasets leaves it to the garbage collector to close metadata.csv.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def image(path, shape=(20, 30), value=100, dtype=np.uint8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(shape, value, dtype)).save(path)


@pytest.mark.parametrize("where", ["file", "folder"])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata_give_each_image_its_text(kind, where, tmp_path):
    image(tmp_path / "a.png")
    image(tmp_path / "scans" / "b.png", (40, 40, 3), 7)
    image(tmp_path / "c.png")
    rows = [("a.png", "no finding", "p1", "normal"), ("scans/b.png", "a mass", "p1", None)]
    rows.append(("c.png", "a cyst", None, None))
    table, names = tmp_path / f"metadata.{kind}", ("file_name", "text", "patient", "label")
    if kind == "csv":
        lines = [",".join(value or "" for value in row) for row in rows]
        table.write_text("\ufeff" + "\n".join([",".join(names), *lines]))
    else:
        table.write_text("\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in rows))

    found = read_captioned(table if where == "file" else tmp_path, "{}")

    by_text = {row["text"]: row for row in found}
    assert by_text.keys() == {"no finding", "a mass", "a cyst"}
    assert by_text["no finding"]["label"] == "normal"
    assert by_text["a mass"]["label"] == "a mass"
    assert (
        by_text["a mass"]["patient"]
        == by_text["no finding"]["patient"]
        == "p1"
        != by_text["a cyst"]["patient"]
    )
    values = pixels([by_text["no finding"]["image"], by_text["a mass"]["image"]], 8)
    expected = torch.tensor([100, 7], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    assert torch.equal(values, expected)


def test_numbers_are_labels_and_patients_too_and_other_columns_are_named(tmp_path, capsys):
    lines = []
    for i, label in enumerate((0, 1, None)):
        image(tmp_path / f"{i}.png")
        row = {"file_name": f"{i}.png", "text": f"text {i}", "label": label, "subject": 0}
        lines.append(json.dumps(row))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))

    found = read_captioned(tmp_path, "{}", "subject")

    labels = dict(zip(found["text"], found["label"], strict=True))
    assert labels == {"text 0": "0", "text 1": "1", "text 2": "text 2"}
    assert len(set(found["patient"])) == 1
    assert "not read" not in capsys.readouterr().out
    assert len(set(read_captioned(tmp_path, "{}")["patient"])) == 3
    assert "Columns that are not read: subject. Patients: --patient_column" in capsys.readouterr().out


def test_folders_make_texts_of_the_names_of_classes(tmp_path, capsys):
    image(tmp_path / "benign" / "1.png")
    image(tmp_path / "benign" / "1_mask.png")
    image(tmp_path / "benign" / "1_mask_1.png")
    image(tmp_path / "not_benign" / "patient 7" / "2.png")
    image(tmp_path / "not_benign" / "only_mask.png")
    image(tmp_path / "3.png")

    found = read_captioned(tmp_path, "breast ultrasound, {}")

    texts = ["breast ultrasound, benign", *["breast ultrasound, not benign"] * 2]
    assert sorted(found["text"]) == texts
    assert set(found["label"]) == {"benign", "not benign"}
    assert len(set(found["patient"])) == 3
    assert "3 images are left out: masks, or in no subfolder" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("metadata.csv", "file_name,caption\na.png,y", "The metadata have caption; every row needs a text"),
        ("metadata.csv", "file_name,text\na.png,", "every row needs a text"),
        ("metadata.csv", "file_name,text\nx.png,y", "x.png, which is no file"),
        ("metadata.csv", "image,text\na.png,y", "file_name"),
        ("metadata.jsonl", "{", "cannot be read"),
        ("metadata.jsonl", "[1]", "file_name"),
        ("metadata.jsonl", "", "cannot be read"),
    ],
)
def test_metadata_that_do_not_fit_are_refused_with_the_reason(name, content, said, tmp_path):
    image(tmp_path / "a.png")
    (tmp_path / name).write_text(content)
    with pytest.raises(TrainerError) as caught:
        read_captioned(tmp_path, "{}")
    assert said in str(caught.value)


def test_a_folder_without_images_and_a_caption_without_a_place_are_refused(tmp_path):
    (tmp_path / "benign").mkdir()
    for data in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(TrainerError, match=r"cannot be read: .* Give a folder with metadata"):
            read_captioned(data, "{}")
    image(tmp_path / "benign" / "1.png")
    with pytest.raises(TrainerError, match=r"--caption needs a \{\}"):
        read_captioned(tmp_path, "an image")


def test_deeper_grey_is_stretched_and_nothing_is_infinite(tmp_path):
    ramp = np.linspace(0, 4095, 16).reshape(4, 4)
    for dtype in (np.uint16, np.float32):
        values = ramp.astype(dtype)
        if dtype is np.float32:
            values[0, 0] = np.nan
        Image.fromarray(values).save(tmp_path / "a.tif")
        with Image.open(tmp_path / "a.tif") as opened:
            found = pixels([opened], 4)[0, 0].double().numpy()
        assert np.abs(found - ramp / 4095 * 255).max() <= 1


def test_texts_are_kept_by_their_number_of_tokens():
    data = captioned(["a", "a b c", "a b c d e"])
    tokenizer = make_tokenizer(data["text"])

    assert list(within_tokens(data, tokenizer, 5, 6)["text"]) == ["a b c"]
    with pytest.raises(TrainerError, match="No text has 20 to 77 tokens: they have 3 to 7"):
        within_tokens(data, tokenizer, 20, 77)


def test_a_held_out_part_shares_no_patient_with_the_rest():
    data = captioned([f"x{i}" for i in range(30)])
    patients = [str(i // 3) for i in range(30)]
    data = data.remove_columns("patient").add_column("patient", patients)

    train, held = hold_out(data, 0.3, seed=1)

    assert set(train["patient"]) | set(held["patient"]) == set(patients)
    assert not set(train["patient"]) & set(held["patient"])
    assert 0 < len(held) < len(train)
    assert all(
        patients[int(text[1:])] == patient
        for text, patient in zip(held["text"], held["patient"], strict=True)
    )


def test_one_patient_cannot_be_divided_and_a_class_must_be_there():
    with pytest.raises(TrainerError, match="cannot be divided"):
        hold_out(captioned(["x"]), 0.5, 0)
    with pytest.raises(TrainerError, match="y has no image in one part of the split"):
        of_classes(captioned(["x"]), ["y"])


def test_tissue_is_graded_by_its_stain():
    data = tissue()

    names = [f"{grade} staining" for grade in ("no", "weak", "moderate", "strong")]
    assert list(dict.fromkeys(data["label"])) == names
    assert len(data) == 1600
    assert {list(data["label"]).count(name) for name in names} == {400}
    images = [pixels(of_classes(data, [name])["image"], SIDE) for name in names]
    blue = [float(some[:, 2].float().mean()) for some in images]
    assert blue == sorted(blue, reverse=True), "brown absorbs blue"
    assert len(set(data["patient"])) == 64


def test_pixels_reach_the_model_and_come_back():
    found = pixels(captioned(["x"])["image"], SIDE)
    assert float(to_model(found).min()) >= -1
    assert torch.equal(to_pixels(to_model(found) / 2 + 0.5), found)
