"""The page to copy trains, and its file gives the trained model back."""

from pathlib import Path

import finetune
import pytest
from torchvision.datasets import ImageFolder

import medpeft


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return finetune.tissue_patches(tmp_path_factory.mktemp("tissue"))


@pytest.mark.parametrize("method", ["ssf", {"lora": {"rank": 2}}])
def test_it_learns_and_tests_what_its_file_gives_back(method, folder, tmp_path, monkeypatch, capsys):
    settings = {"METHOD": method, "SIZE": 32, "EPOCHS": 2, "ADAPTER": tmp_path / "runs" / "a.safetensors"}
    for name, value in settings.items():
        monkeypatch.setattr(finetune, name, value)
    finetune.main(folder)
    lines = capsys.readouterr().out.splitlines()
    validated = [float(line.rpartition(" ")[2]) for line in lines if line.startswith("epoch")]
    assert len(validated) == 2
    assert any("act in train and in eval mode" in line for line in lines)
    _, _, f1, _, auroc, *_ = lines[-1].replace(",", "").replace(";", "").split()
    assert 0.5 < float(f1) <= 1
    assert 0.6 < float(auroc) <= 1
    assert medpeft.inspect(settings["ADAPTER"]).methods.keys() == {"ssf" if method == "ssf" else "lora"}


def test_no_patient_is_in_two_parts(folder):
    images = ImageFolder(folder)
    parts = finetune.split(images)
    assert sorted(row for part in parts for row in part) == list(range(256))
    patients = [{Path(images.samples[row][0]).name.partition("_patch")[0] for row in part} for part in parts]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 64


def test_it_is_a_page():
    assert len(Path(finetune.__file__).read_text(encoding="utf-8").splitlines()) <= 130
