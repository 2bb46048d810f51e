"""Tables as people have them are read, or the message says what is wrong."""

import pytest
from pictures import grey, write
from small_training import read
from trainer.data.tables import read_table
from trainer.errors import TrainerError


def images_below(folder, count=8):
    for i in range(count):
        write(folder / f"{i}.png", grey())
    return folder


def written(folder, text, encoding="utf-8"):
    (images_below(folder) / "table.csv").write_bytes(text.encode(encoding))
    return folder / "table.csv"


def lines(labels, separator=",", suffix=".png"):
    return "".join(f"{i}{suffix}{separator}{label}\n" for i, label in enumerate(labels))


LABELS = ["Läsion", "gesund"] * 4


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252", "utf-16"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_any_encoding_and_separator_is_read(tmp_path, encoding, separator):
    file = written(tmp_path, f"path{separator}label\n" + lines(LABELS, separator), encoding)
    images = read(file)
    assert images.classes == ["Läsion", "gesund"]
    assert len(images) == 8


def test_headers_in_capitals_and_other_names_are_found(tmp_path):
    assert read(written(tmp_path, "Path,LABEL\n" + lines(["a", "b"] * 4))).classes == ["a", "b"]
    file = written(tmp_path, "image_id,dx,id\n" + lines([f"{c},{i}" for i, c in enumerate("abababab")]))
    assert read(file, path_column="image_id", label_column="dx").classes == ["a", "b"]


def test_a_missing_suffix_and_the_slashes_of_windows_are_mended(tmp_path):
    images_below(tmp_path / "sub")
    write(tmp_path / "sub" / "0.v2.png", grey())
    rows = ["sub\\0", "sub\\1.png", "sub/0.v2", "sub/3"]
    (tmp_path / "table.csv").write_text(
        "path,label\n" + "".join(f"{row},{'ab'[i % 2]}\n" for i, row in enumerate(rows))
    )
    assert len(read(tmp_path / "table.csv")) == 4


def test_blanks_around_labels_are_no_classes_of_their_own(tmp_path):
    file = written(tmp_path, "path, label\n" + lines(["a", " a", "a ", "b", "b", " b", "b", "a"]))
    assert read(file).classes == ["a", "b"]


@pytest.mark.parametrize(
    ("first", "second"), [("benign", "Benign"), ("1", "1.0"), ("no finding", "no_finding")]
)
def test_labels_that_differ_in_spelling_alone_are_refused(tmp_path, first, second):
    file = written(tmp_path, "path,label\n" + lines([first, second, "other", first] * 2))
    with pytest.raises(TrainerError, match=r"differ in spelling alone\. If they are one, write them alike"):
        read(file)
    assert len(read_table(file)) == 8


@pytest.mark.parametrize("empty", ["nan", "NA", "", "  "])
def test_what_means_no_label_is_no_class(tmp_path, empty):
    file = written(tmp_path, "path,label\n" + lines(["a", "b", empty, "a"]))
    with pytest.raises(TrainerError, match="1 rows without a 'label', the first on line 4"):
        read(file)


def test_several_labels_for_one_image_are_refused(tmp_path):
    file = written(tmp_path, "path,label\n" + lines(["Effusion", "Edema", "Effusion|Edema", "Edema"]))
    with pytest.raises(TrainerError, match=r"'Effusion\|Edema' names several findings"):
        read(file)


def test_numbers_keep_their_order(tmp_path):
    file = written(tmp_path, "path,label\n" + lines(["0.0", "10.0", "2.0", "1.0"]))
    assert read(file).classes == ["0.0", "1.0", "2.0", "10.0"]


@pytest.mark.parametrize("column", ["patient_id", "PatientID", "subject_id", "lesion_id"])
def test_a_column_that_looks_like_patients_is_named_when_it_is_ignored(tmp_path, column):
    file = written(tmp_path, f"path,label,{column}\n" + lines([f"{'ab'[i % 2]},p{i // 2}" for i in range(8)]))
    images = read(file)
    assert len(set(images.groups.tolist())) == 8
    plain = "Split image by image, as no column of patients is named."
    assert images.notes == [f"{plain} '{column}' looks like one: --patient-column '{column}'."]
    together = read(file, patient_column=column)
    assert len(set(together.groups.tolist())) == 4
    assert together.notes == []


def test_a_table_without_patients_says_that_images_are_split(tmp_path):
    images = read(written(tmp_path, "path,label\n" + lines(["a", "b"] * 4)))
    assert images.notes == ["Split image by image, as no column of patients is named."]


def test_a_ragged_table_is_answered_with_its_line(tmp_path):
    file = written(tmp_path, "path,label\n0.png,a\n1.png,b,c,d,e\n")
    with pytest.raises(TrainerError, match=r"could not be read as a table: .*line 3"):
        read(file)
