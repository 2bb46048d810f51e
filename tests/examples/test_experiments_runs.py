"""A run is recorded once, by whichever process does it."""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from experiments.cells import Choice, Split, make_cell
from experiments.records import Records
from experiments.runs import run_cells
from trainer.errors import TrainerError


def test_a_record_is_there_once_and_survives_a_torn_line(tmp_path):
    records = Records(tmp_path)
    records.append({"key": "a", "value": 1})
    with records.path.open("ab") as file:
        file.write(b'{"key": "b", "val')  # a process was killed here
    assert set(records.read()) == {"a"}
    records.append({"key": "c", "value": float("nan")})
    assert records.read() == {"a": {"key": "a", "value": 1}, "c": {"key": "c", "value": None}}
    assert [json.loads(line)["key"] for line in records.path.read_text().splitlines()] == ["a", "c"]


def test_records_of_several_machines_are_read_together(tmp_path):
    Records(tmp_path, "-1").append({"key": "a"})
    Records(tmp_path, "-2").append({"key": "b"})
    assert set(Records(tmp_path).read()) == {"a", "b"}


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "runs.jsonl").write_text('{"key": "a"}\nnonsense\n')
    with pytest.raises(
        TrainerError, match=r"runs\.jsonl, line 2, is no JSON.* Take the line out; its run is done again"
    ):
        Records(tmp_path).read()


# The runs


def cells_in(folder, count):
    return [
        make_cell([], None, "test_efficientnet", Choice("ssf", ("--method", "ssf")), Split(s), folder)
        for s in range(count)
    ]


@pytest.fixture
def slow_runs(monkeypatch):
    """Runs that take a moment and train nothing; the keys of those that began."""
    begun = []

    def run_cell(cell, images):
        begun.append(cell.key)
        time.sleep(0.2)
        return {"key": cell.key, "test": {"macro_f1": 0.5}}

    monkeypatch.setattr("experiments.runs.images_of", lambda args: None)
    monkeypatch.setattr("experiments.runs.run_cell", run_cell)
    return begun


def test_the_same_command_started_twice_shares_the_runs(tmp_path, slow_runs):
    cells, records = cells_in(tmp_path, 5), Records(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        failed = list(pool.map(lambda _: run_cells(cells, records), range(2)))
    assert failed == [[], []]
    assert sorted(slow_runs) == sorted(cell.key for cell in cells), "a run was done twice or not at all"
    assert set(records.read()) == set(slow_runs)


def test_a_run_whose_process_died_is_taken_over(tmp_path, slow_runs):
    cells, records = cells_in(tmp_path, 2), Records(tmp_path)
    cells[0].args.output.mkdir(parents=True)
    script = "import filelock, sys, time; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(1, flush=True)"
    script += "; time.sleep(60)"
    command = [sys.executable, "-c", script, cells[0].args.output / "run.lock"]
    other = subprocess.Popen(command, stdout=subprocess.PIPE)
    other.stdout.read(1)
    with ThreadPoolExecutor(1) as pool:
        ours = pool.submit(run_cells, cells, records)
        while not records.read():
            assert other.poll() is None, "it ended before it was killed"
            time.sleep(0.01)
        assert slow_runs == [cells[1].key]
        other.kill()
        other.communicate()
        assert ours.result() == []
    assert slow_runs == [cells[1].key, cells[0].key]
