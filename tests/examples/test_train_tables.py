"""Images come from folders and tables, with their classes, patients and parts, or the message says what is wrong."""

import csv

import numpy as np
import pytest
import torch
from pictures import grey, write
from places import ROOT
from small_training import read
from trainer.errors import TrainerError
from trainer.files.images import decode

BUSI = ROOT.parent / "shared" / "data" / "busi"


def grey_images(folder, count):
    """Writes grey images of two classes, so many of each, and gives their folder."""
    for name in ("benign", "malignant"):
        for i in range(count):
            write(folder / name / f"{i}.png", grey())
    return folder


@pytest.fixture
def folder(tmp_path):
    return grey_images(tmp_path / "images", 4)


@pytest.fixture
def table(folder):
    """Writes a CSV beside the images and gives its path."""

    def write_table(columns, rows):
        with (folder / "table.csv").open("w", newline="") as file:
            csv.writer(file).writerows([columns, *rows])
        return folder / "table.csv"

    return write_table


# Folders


def test_a_folder_gives_one_class_a_subfolder(folder):
    images = read(folder, 16)
    assert images.classes == ["benign", "malignant"]
    assert images.targets.tolist() == [0] * 4 + [1] * 4
    assert images.pixels.shape == (8, 1, 16, 16)
    assert images.pixels.dtype == torch.uint8
    assert not len(images.parts)


def test_one_colour_image_makes_all_colour(folder):
    write(folder / "benign" / "colour.jpg", np.zeros((30, 20, 3), np.uint8))
    images = read(folder, 16)
    assert images.pixels.shape == (9, 3, 16, 16)
    assert torch.equal(images.pixels[0, 0], images.pixels[0, 2])


def test_pixels_keep_their_image(folder):
    write(folder / "benign" / "0.png", grey(200))
    assert (read(folder, 16).pixels[0] == 200).all()


def test_copies_of_an_image_share_a_group(folder):
    copied = decode(folder / "benign" / "0.png")
    write(folder / "malignant" / "copy.bmp", copied)
    images = read(folder, 16)
    assert len(set(images.groups.tolist())) == 8
    assert images.groups[0] == images.groups[-1]


def test_a_folder_that_is_split_already_keeps_its_split(tmp_path):
    for part in ("train", "valid", "test"):
        for name in ("a", "b"):
            write(tmp_path / part / name / "image.png", grey())
    images = read(tmp_path, 16)
    assert images.classes == ["a", "b"]
    assert sorted(images.parts.tolist()) == ["test", "test", "train", "train", "val", "val"]


def test_an_empty_folder_says_what_to_put_there(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(TrainerError, match=r"no images in its 1 subfolders. Put the images of each"):
        read(tmp_path, 16)


def test_a_single_class_is_refused(tmp_path):
    write(tmp_path / "only" / "image.png", grey())
    with pytest.raises(TrainerError, match=r"only the class 'only'\. At least two"):
        read(tmp_path, 16)


def test_missing_data_and_unknown_kinds_are_named(tmp_path):
    with pytest.raises(TrainerError, match=r"nowhere does not exist\. Give a folder"):
        read(tmp_path / "nowhere", 16)
    (tmp_path / "data.xlsx").touch()
    with pytest.raises(TrainerError, match=r"is a \.xlsx file\. Give a folder"):
        read(tmp_path / "data.xlsx", 16)


@pytest.mark.skipif(not BUSI.exists(), reason="needs ../shared/data/busi")
def test_breast_ultrasound_is_read_with_its_one_pair_of_copies():
    images = read(BUSI, 32)
    assert images.classes == ["benign", "malignant", "normal"]
    assert np.bincount(images.strata).tolist() == [437, 210, 133]
    assert len(set(images.groups.tolist())) == 779


# Tables


def test_a_table_names_images_labels_patients_and_parts(table):
    rows = [
        ["benign/0.png", "10", "p1", "train"],
        ["benign/1.png", "2", "p1", "val"],
        ["malignant/0.png", "10", "p2", "test"],
    ]
    images = read(table(["path", "label", "patient", "split"], rows), 16)
    assert images.classes == ["2", "10"]
    assert images.targets.tolist() == [1, 0, 1]
    assert images.parts.tolist() == ["train", "val", "test"]
    assert images.groups[0] == images.groups[1] != images.groups[2]


def test_the_patient_column_may_have_another_name(table):
    rows = [["benign/0.png", "a", "7"], ["benign/1.png", "b", "7"]]
    file = table(["path", "label", "case"], rows)
    assert len(set(read(file).groups.tolist())) == 2
    assert len(set(read(file, patient_column="case").groups.tolist())) == 1


@pytest.mark.parametrize(
    ("columns", "rows", "message"),
    [
        (["file", "label"], [["x", "a"]], "has the columns file, label, and no 'path'"),
        (["path", "label"], [], "no rows below its header"),
        (["path", "label"], [["benign/0.png", ""]], "1 rows without a 'label', the first on line 2"),
        (["path", "label"], [["gone.png", "a"]], "1 images that do not exist, the first is gone.png"),
        (
            ["path", "label", "split"],
            [["benign/0.png", "a", "hold-out"]],
            "the split 'hold-out'. Use train, val and test",
        ),
    ],
)
def test_a_wrong_table_says_what_is_wrong(table, columns, rows, message):
    with pytest.raises(TrainerError, match=message):
        read(table(columns, rows), 16)


def test_a_patient_column_that_is_asked_for_must_exist(table):
    file = table(["path", "label"], [["benign/0.png", "a"]])
    with pytest.raises(TrainerError, match=r"no 'case'.*--patient-column"):
        read(file, patient_column="case")


# Broken images


@pytest.fixture
def broken(folder):
    """Two files of eight that are no images."""
    for name in ("benign/1.png", "malignant/3.png"):
        (folder / name).write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    return folder


def test_all_broken_images_are_named_and_counted(broken):
    with pytest.raises(TrainerError) as raised:
        read(broken, 16)
    message = str(raised.value)
    assert message.startswith("2 of 8 images cannot be read:")
    for expected in ("benign/1.png", "malignant/3.png", "Leave them out with --skip-broken."):
        assert expected in message


def test_broken_images_are_left_out_only_when_asked(broken, table):
    images = read(broken, 16, skip_broken=True)
    assert images.targets.tolist() == [0] * 3 + [1] * 3
    assert images.names == [
        f"{name}.png" for name in ("benign/0", "benign/2", "benign/3", *(f"malignant/{i}" for i in range(3)))
    ]
    assert len(images.broken) == 2
    assert len(images.groups) == len(images.pixels) == 6
    rows = [
        ["benign/0.png", "a", "f"],
        ["benign/1.png", "b", "m"],
        ["gone.png", "b", "m"],
        ["benign/2.png", "b", "d"],
    ]
    images = read(table(["path", "label", "sex"], rows), 16, group_column="sex", skip_broken=True)
    assert (images.names, images.subgroups) == (["benign/0.png", "benign/2.png"], ["f", "d"])


def test_nothing_but_broken_images_is_an_error_even_when_skipping(folder):
    for path in folder.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(TrainerError, match="8 of 8 images cannot be read"):
        read(folder, 16, skip_broken=True)


# As people's folders are


def test_masks_beside_their_images_are_left_out(tmp_path):
    for name in ("benign", "normal"):
        for i in range(3):
            write(tmp_path / name / f"{name} ({i}).png", grey())
            write(tmp_path / name / f"{name} ({i})_mask.png", grey(0))
        write(tmp_path / name / f"{name} (1)_mask_1.png", grey(1))
        write(tmp_path / name / "a_mask.png", grey())
    images = read(tmp_path)
    assert len(images) == 8
    assert images.notes[0].startswith(
        "benign: 4 masks beside their images are left out, such as benign (0)_mask.png"
    )
    assert len(read(tmp_path, masks=True)) == 16


def test_files_that_are_passed_over_are_counted(folder):
    for name in ("notes.txt", "photo.heic", "other.HEIC", "Thumbs"):
        (folder / "benign" / name).write_bytes(b"x")
    (folder / "benign" / ".DS_Store").write_bytes(b"x")
    images = read(folder)
    assert len(images) == 8
    assert images.notes == ["benign: 4 files are no images and are passed over: 2 .heic, 1 .txt, 1 no suffix"]


def test_blank_images_are_counted(folder):
    for i in (0, 2):
        write(folder / "malignant" / f"{i}.png", grey(i))
    assert read(folder).notes == ["2 images are blank, of one value everywhere; the first: malignant/0.png"]


# Another site


@pytest.fixture
def site(tmp_path):
    return grey_images(tmp_path / "site", 3)


def test_images_of_another_site_are_the_test(folder, site):
    images = read(folder, test_data=str(site))
    assert images.parts.tolist() == ["train"] * 8 + ["test"] * 6
    # `benign/0.png` of one site is not that of the other.
    assert len(set(images.groups.tolist())) == 14


def test_a_test_of_other_classes_or_beside_another_test_is_refused(folder, site):
    write(site / "unclear" / "0.png", grey())
    with pytest.raises(
        TrainerError, match="--test-data has the class 'unclear', and --data only benign, malignant"
    ):
        read(folder, test_data=str(site))
    for part in ("train", "test"):
        for name in ("a", "b"):
            write(folder.parent / "split" / part / name / "0.png", grey())
    with pytest.raises(TrainerError, match="--data has a test part of its own"):
        read(folder.parent / "split", test_data=str(folder.parent / "split"))
