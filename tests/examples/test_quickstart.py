"""The notebook runs as it is, and what it shows is what it computed."""

import nbformat
import pytest
from nbclient import NotebookClient
from places import ROOT

import medpeft

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell):
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


def pictures(notebook):
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook after a short run on small images, and the folder in which it ran."""
    folder = tmp_path_factory.mktemp("quickstart")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    settings = (
        f"import sys; sys.path.insert(0, {str(NOTEBOOK.parent)!r}); import finetune; finetune.SIZE = 48"
    )
    notebook.cells.insert(0, nbformat.v4.new_code_cell(settings))
    for cell in notebook.cells:
        cell.source = cell.source.replace("EPOCHS = 6", "EPOCHS = 4")
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv(
            "MPLBACKEND", raising=False
        )  # Another than the notebook's own shows no pictures in it.
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook, folder


def test_it_trains_and_tests_an_adapter(executed):
    notebook, folder = executed
    text = "".join(printed(cell) for cell in code_cells(notebook))
    _, _, f1, _, auroc = text.splitlines()[-1].replace(",", "").split()
    assert "act in train and in eval mode" in text
    assert text.count("validation macro-F1") == 4
    assert 0.5 < float(f1) <= 1
    assert 0.6 < float(auroc) <= 1
    assert medpeft.inspect(folder / "runs" / "quickstart" / "adapter.safetensors").methods.keys() == {"ssf"}


def test_it_ends_in_four_pictures(executed):
    notebook, _ = executed
    assert len(pictures(notebook)) == 4


def test_it_is_kept_with_the_outputs_of_one_run_from_top_to_bottom():
    kept = nbformat.read(NOTEBOOK, as_version=4)
    counts = [cell.execution_count for cell in code_cells(kept)]
    names = {output.get("name") or output.output_type for cell in code_cells(kept) for output in cell.outputs}
    assert counts == list(range(1, len(counts) + 1))
    assert names == {"stdout", "display_data"}
    assert len(pictures(kept)) == 4
