"""Masks as they are found: beside their images in several forms, and everything that can be wrong with them."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from small_masks import draw_balls, draw_discs, save
from small_training import checked, read
from trainer.data.sources import rows_of
from trainer.data.splits import split
from trainer.errors import TrainerError
from trainer.tasks import Segment

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 255, (12, 4, 8, 8))
HALF = np.repeat([[0, 1]], 8, axis=0).repeat(4, axis=1)  # 8 × 8, its right half


def images(folder, count=6, at="{}.png"):
    for i in range(count):
        save(GREY[i, 0], folder / at.format(i))


def masks_of(data, **more):
    return read(data, task="segment", **more).targets.labels.numpy()


# Forms


def test_folders_side_by_side_are_paired_by_name(tmp_path):
    data = read(draw_discs(tmp_path, 4, side=16), task="segment")
    assert data.names == ["images/0.png", "images/1.png", "images/2.png", "images/3.png"]
    inside = data.pixels[:, 0][data.targets.labels == 1].float().mean()
    assert inside > data.pixels[:, 0][data.targets.labels == 0].float().mean() + 60


def test_numbers_of_a_channel_and_suffixes_of_masks_are_no_part_of_a_name(tmp_path):
    images(tmp_path / "imagesTr", at="case{}_0000.png")
    for i in range(6):
        save(HALF * (i > 0), tmp_path / "labelsTr" / f"case{i}.png")
    assert masks_of(tmp_path).any((1, 2)).tolist() == [False, *[True] * 5]
    images(tmp_path / "other" / "images", at="a{}.png")
    for i in range(6):
        save(HALF * (i > 2), tmp_path / "other" / "masks" / f"a{i}_mask.png")
    assert masks_of(tmp_path / "other").any((1, 2)).sum() == 3


def test_several_channels_of_a_case_are_refused(tmp_path):
    images(tmp_path / "images", 2, at="case_000{}.png")
    save(HALF, tmp_path / "masks" / "case.png")
    with pytest.raises(TrainerError, match=r"case_0000.png and case_0001.png are channels of one case"):
        read(tmp_path, task="segment")


def test_masks_beside_their_images_are_united_as_in_busi(tmp_path):
    for kind in ("benign", "malignant"):
        images(tmp_path / kind, 3, at=kind + " ({}).png")
        for i in range(3):
            save(255 * HALF, tmp_path / kind / f"{kind} ({i})_mask.png")
    save(255 * (1 - HALF), tmp_path / "benign" / "benign (1)_mask_1.png")
    found = masks_of(tmp_path)
    assert found[0].mean() == 0.5
    assert found[1].mean() == 1
    assert len(found) == 6


def test_a_table_names_masks_and_patients(tmp_path):
    images(tmp_path)
    lines = ["path,truth,patient"]
    for i in range(6):
        save(HALF, tmp_path / "m" / f"{i}x.png")
        lines.append(f"{i}.png,m/{i}x.png,{i // 2}")
    (tmp_path / "t.csv").write_text("\n".join(lines))
    data = read(tmp_path / "t.csv", task="segment", mask_column="truth")
    assert len(set(data.groups)) == 3
    assert data.targets.labels.float().mean() == 0.5
    with pytest.raises(
        TrainerError, match=r"no column 'mask'. Name the one of the masks' files with --mask-column"
    ):
        read(tmp_path / "t.csv", task="segment")


def test_a_split_that_the_folders_have_is_kept(tmp_path):
    for part in ("train", "val", "test"):
        images(tmp_path / part / "images", 2)
        for i in range(2):
            save(HALF, tmp_path / part / "masks" / f"{i}.png")
    assert read(tmp_path, task="segment").parts.tolist() == ["test"] * 2 + ["train"] * 2 + ["val"] * 2


def test_palettes_and_grey_in_three_channels_are_labels(tmp_path):
    images(tmp_path / "images", 2)
    palette = Image.fromarray(HALF.astype(np.uint8), mode="P")
    palette.putpalette([255, 255, 255, 200, 10, 10])
    (tmp_path / "masks").mkdir()
    palette.save(tmp_path / "masks" / "0.png")
    save(np.stack([HALF] * 3, 2), tmp_path / "masks" / "1.png")
    assert np.array_equal(masks_of(tmp_path), [HALF, HALF])


def test_masks_of_volumes_beside_them_are_no_images_for_a_classifier(tmp_path):
    for name in ("a/x.nii.gz", "a/x_seg.nii.gz", "b/y.nii.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert rows_of(str(tmp_path), checked(data=str(tmp_path))).column("name") == ["a/x.nii.gz", "b/y.nii.gz"]


def test_another_site_is_the_test(tmp_path):
    draw_discs(tmp_path / "here", 4, side=16)
    draw_discs(tmp_path / "there", 2, side=16)
    data = read(tmp_path / "here", task="segment", test_data=str(tmp_path / "there"))
    assert data.parts.tolist() == ["train"] * 4 + ["test"] * 2


# Values


def test_structures_are_numbered_in_the_order_of_their_values_and_named(tmp_path):
    images(tmp_path / "images", 3)
    for i, values in enumerate(([0, 4], [0, 1], [2, 4])):
        save(np.array(values)[HALF], tmp_path / "masks" / f"{i}.png")
    data = read(tmp_path, task="segment")
    assert data.classes == ["1", "2", "4"]
    assert data.details["values"] == [1, 2, 4]
    assert data.targets.labels[:, 0, ::7].tolist() == [[0, 3], [0, 1], [2, 3]]
    named = read(tmp_path, task="segment", structure=["oedema", "core", "tumour"])
    assert named.classes == ["oedema", "core", "tumour"]
    with pytest.raises(
        TrainerError, match=r"names 1 structures \(a\), and the masks have the values 1, 2, 4"
    ):
        read(tmp_path, task="segment", structure=["a"])


FAULTS = {
    "size": (np.ones((4, 8)), "it is 4 × 8, and its image .*0.png is 8 × 8"),
    "colour": (np.stack([HALF, HALF * 2, HALF], 2), "it is in colour. Store one number for each pixel"),
    "image": (np.arange(256).reshape(16, 16), "256 different values, as an image has"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_mask_is_refused_by_name_or_left_out(tmp_path, fault):
    images(tmp_path / "images", 4)
    for i in range(4):
        save(HALF, tmp_path / "masks" / f"{i}.png")
    array, message = FAULTS[fault]
    path = save(array, tmp_path / "masks" / "0.png")
    if fault == "image":
        save(array, tmp_path / "images" / "0.png")
    with pytest.raises(TrainerError, match=f"1 of 4 masks cannot be read:\n  {path}.*{message}"):
        read(tmp_path, task="segment")
    data = read(tmp_path, task="segment", skip_broken=True)
    assert data.names == ["images/1.png", "images/2.png", "images/3.png"]
    assert len(data.pixels) == len(data.targets) == len(data.groups) == 3
    assert len(data.broken) == 1


def test_blurred_edges_of_jpeg_and_doubtful_255_are_refused(tmp_path):
    images(tmp_path / "images", 2)
    save(HALF, tmp_path / "masks" / "0.png")
    blurred = HALF * 255
    blurred[:, 3] = 90
    Image.fromarray(blurred.astype(np.uint8)).save(tmp_path / "masks" / "1.jpg")
    with pytest.raises(TrainerError, match=r"jpg files blur edges. Set a threshold"):
        read(tmp_path, task="segment")
    (tmp_path / "masks" / "1.jpg").unlink()
    save(HALF * 255, tmp_path / "masks" / "1.png")
    with pytest.raises(TrainerError, match=r"values 1, 255. Is 255 a structure of its own"):
        read(tmp_path, task="segment")
    assert read(tmp_path, task="segment", structure=["organ", "tube"]).classes == ["organ", "tube"]


def test_partners_that_are_missing_are_counted(tmp_path):
    images(tmp_path / "images", 4)
    for i in (1, 2, 7):
        save(HALF, tmp_path / "masks" / f"{i}.png")
    with pytest.raises(
        TrainerError, match=r"2 of 4 images have no mask, the first: images/0.png.*--skip-broken"
    ):
        read(tmp_path, task="segment")
    data = read(tmp_path, task="segment", skip_broken=True)
    assert len(data) == 2
    assert any("1 masks have no image and are passed over" in note for note in data.notes)
    images(tmp_path / "bare")
    with pytest.raises(TrainerError, match=r"6 images, and no mask of one. Give folders images/ and masks/"):
        read(tmp_path / "bare", task="segment")


def test_empty_masks_are_counted_and_all_empty_ones_refused(tmp_path):
    images(tmp_path / "images", 4)
    for i in range(4):
        save(HALF * (i > 1), tmp_path / "masks" / f"{i}.png")
    data = read(tmp_path, task="segment")
    assert "2 masks are empty: their images have no structure" in data.notes
    for i in range(4):
        save(HALF * 0, tmp_path / "masks" / f"{i}.png")
    with pytest.raises(TrainerError, match="Every mask is empty"):
        read(tmp_path, task="segment")


def test_a_structure_that_is_too_small_for_the_size_is_told_of(tmp_path):
    images(tmp_path / "images", 2)
    save(np.kron(HALF, np.ones((4, 4))), tmp_path / "images" / "1.png")
    for i, side in ((0, 8), (1, 32)):
        mask = np.zeros((side, side))
        mask[0, 0] = 1
        save(mask, tmp_path / "masks" / f"{i}.png")
    data = read(tmp_path, 9, task="segment")
    assert any("1 of 2 structures in images vanish at 9 × 9" in note for note in data.notes)


# Splits


def test_each_part_has_every_structure_and_no_copy_is_divided(tmp_path):
    for i in range(60):
        save(GREY[i % 12, i % 4] if i < 2 else RNG.integers(0, 255, (8, 8)), tmp_path / "images" / f"{i}.png")
        save(HALF * (1 + i % 3), tmp_path / "masks" / f"{i}.png")
    save(np.array(Image.open(tmp_path / "images" / "0.png")), tmp_path / "images" / "1.png")
    data = read(tmp_path, task="segment")
    found = split(data, checked(task="segment"))
    for rows in found.values():
        assert set(data.targets.labels[torch.from_numpy(rows)].unique().tolist()) == {0, 1, 2, 3}
    assert data.groups[0] == data.groups[1]


# NIfTI


def test_volumes_and_masks_of_any_orientation_lie_on_each_other(tmp_path):
    pytest.importorskip("nibabel")
    first = read(draw_balls(tmp_path / "a", 2), task="segment")
    other = read(draw_balls(tmp_path / "b", 2, axes="RAS"), task="segment")
    assert torch.equal(first.pixels, other.pixels)
    assert torch.equal(first.targets.labels, other.targets.labels)
    assert first.pixels[:, 0][first.targets.labels == 1].float().mean() > 150
    assert first.targets.sides.tolist() == [[3.0, 2.0, 1.0]] * 2
    assert first.details["unit"] == "mm"


def test_a_mask_that_lies_elsewhere_or_holds_probabilities_is_refused(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    draw_balls(tmp_path, 2)
    file = tmp_path / "labelsTr" / "case0.nii.gz"
    mask = nibabel.load(file)
    moved = mask.affine.copy()
    moved[0, 3] += 12
    nibabel.save(nibabel.Nifti1Image(mask.get_fdata(), moved), file)
    with pytest.raises(TrainerError, match=r"lies elsewhere than its image .*: the affines differ by 12 mm"):
        read(tmp_path, task="segment")
    nibabel.save(nibabel.Nifti1Image(mask.get_fdata() * 0.4, mask.affine), file)
    with pytest.raises(TrainerError, match="values between whole numbers, as probabilities"):
        read(tmp_path, task="segment")
    nibabel.save(nibabel.Nifti1Image(mask.get_fdata() * 70000, mask.affine), file)
    with pytest.raises(TrainerError, match="the value 70000, and files of masks hold 65535 at most"):
        read(tmp_path, task="segment")


def test_all_masks_that_are_written_have_the_type_that_the_highest_value_needs(tmp_path):
    task = Segment(["tube"]).informed({"values": [300], "unit": "px", "dimensions": 2, "patch": None})
    rows = pd.DataFrame({"item": ["a.png", "b.png"], "name": ["a.png", "b.png"], "shape": [(4, 4)] * 2})
    # (B, S + 1, H, W): all background, and all structure
    logits = torch.stack([torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])])[:, :, None, None]
    task.write(logits.expand(2, 2, 4, 4), rows, tmp_path)
    for name, value in (("a", 0), ("b", 300)):
        written = np.asarray(Image.open(tmp_path / f"{name}.png"))
        assert (written.dtype, np.unique(written).tolist()) == (np.uint16, [value])
