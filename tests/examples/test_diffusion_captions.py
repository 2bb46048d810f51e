"""Each image has its text, from a table or from its folder, and a part held out shares no group with the rest."""

import json

import numpy as np
import pytest
import torch
from diffusion.captions import halves, hold_out, read_captioned, tissue, to_model, to_pixels, within_tokens
from diffusion.tiny import make_tokenizer
from PIL import Image
from small_diffusion import SIDE, captioned
from trainer.errors import TrainerError


def image(path, shape=(20, 30), value=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(shape, value, np.uint8)).save(path)


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
    assert torch.equal(
        found.pixels([0, 1]), torch.tensor([100, 7], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    )


def test_folders_make_texts_of_the_names_of_classes(tmp_path):
    image(tmp_path / "benign" / "1.png")
    image(tmp_path / "not_benign" / "2.png")
    found = read_captioned(tmp_path, 8, "breast ultrasound, {}")
    assert found.texts == ["breast ultrasound, benign", "breast ultrasound, not benign"]
    assert found.prompts(1) == ["breast ultrasound, benign"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "a.csv",
            "file,caption\nx.png,y",
            "Name the image files in one of file_name, file, path, image, and what they show",
        ),
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
    blue = [
        float(data.of([name]).pixels(range(400))[:, 2].float().mean())
        for half in halves(data)
        for name in half
    ]
    assert blue == sorted(blue, reverse=True), "brown absorbs blue"


def test_pixels_reach_the_model_and_come_back():
    pixels = captioned(["x"]).pixels([0])
    assert float(to_model(pixels).min()) >= -1
    assert torch.equal(to_pixels(to_model(pixels) / 2 + 0.5), pixels)
