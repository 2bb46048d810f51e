"""What is no file, places that cannot be written, and processes killed while they write: an error or a whole file."""

import copy
import importlib
import os
import subprocess
import sys

import pytest
import torch
from places import IMPORTABLE
from small_checkpoints import Small, adapted, saved_small

import medpeft
from medpeft.checkpoint.writing import write

load_module = importlib.import_module("medpeft.checkpoint.load")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return saved_small(tmp_path_factory.mktemp("whole") / "a.safetensors")


def test_things_that_are_no_files_are_refused(whole, tmp_path):
    for path in (tmp_path, tmp_path / "nothing", "\0", "", os.devnull):
        with pytest.raises(medpeft.CheckpointError):
            medpeft.load(Small(), path)
        with pytest.raises(medpeft.CheckpointError):
            medpeft.inspect(path)


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs /proc")
def test_files_that_cannot_be_read_or_would_wait_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/proc/self/mem", "/proc/self/pagemap", "/dev/zero"):
        with pytest.raises(medpeft.CheckpointError):
            medpeft.load(Small(), path)
        with pytest.raises(medpeft.CheckpointError):
            medpeft.inspect(path)


def test_a_file_cut_off_or_written_over_while_it_is_read_loads_as_it_was_or_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    base = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 2))
    model = medpeft.apply(copy.deepcopy(base), "lora", target="0", rank=64, head="1")
    with torch.no_grad():
        model[0].adapters.lora.up.fill_(1.0)
    medpeft.save(model, path)
    data = path.read_bytes()
    read_values = load_module.read_values
    refusals = 0
    for changed in (
        data[:-4],
        data[:40],
        b"",
        data[:-4] + b"abcd",
        data.replace(b"lora", b"arol"),
        data + data,
    ):

        def meanwhile(file, header, changed=changed):
            path.write_bytes(changed)
            return read_values(file, header)

        path.write_bytes(data)
        monkeypatch.setattr(load_module, "read_values", meanwhile)
        fresh = copy.deepcopy(base)
        try:
            medpeft.load(fresh, path)
        except medpeft.CheckpointError:
            refusals += 1
            assert not hasattr(fresh[0], "adapters")
        else:
            assert torch.equal(fresh[0].adapters.lora.up, model[0].adapters.lora.up)
    assert refusals >= 4


@pytest.mark.parametrize("dtype", [torch.complex128, torch.uint16, torch.uint32, torch.uint64])
def test_a_dtype_that_cannot_be_read_again_is_not_written(dtype, tmp_path):
    with pytest.raises(medpeft.CheckpointError, match=rf"'odd' is {str(dtype).removeprefix('torch.')}"):
        write(str(tmp_path / "a"), {"odd": torch.zeros(2, dtype=dtype)}, {})
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written_are_refused_and_keep_what_they_have(tmp_path):
    model = adapted()
    (tmp_path / "file").write_bytes(b"mine")
    for path in (tmp_path, tmp_path / "missing" / "a", tmp_path / "file" / "a", "\0"):
        with pytest.raises(medpeft.CheckpointError):
            medpeft.save(model, path)
    assert (tmp_path / "file").read_bytes() == b"mine"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_disk_that_fails_leaves_the_old_file_and_nothing_else(step, tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    medpeft.save(adapted(), path, metadata={"i": 1})
    before = path.read_bytes()

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(medpeft.CheckpointError, match=r"cannot be written: .*No space left on device"):
        medpeft.save(adapted(), path, metadata={"i": 2})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_saved_file_has_the_permissions_of_any_other_and_keeps_its_links(tmp_path):
    path = tmp_path / "a.safetensors"
    (tmp_path / "link").symlink_to(path)
    before = os.umask(0o027)
    try:
        medpeft.save(adapted(), tmp_path / "link")
        assert path.stat().st_mode & 0o777 == 0o640
        path.chmod(0o604)
        medpeft.save(adapted(), path)
        assert path.stat().st_mode & 0o777 == 0o604
    finally:
        os.umask(before)
    assert (tmp_path / "link").is_symlink()


KILLS = 100

KILLING = f"""
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
import medpeft
from small_checkpoints import Small, adapted

folder = sys.argv[1]
path = os.path.join(folder, "a.safetensors")

def keep_saving(started):
    model, i = adapted(), 0
    while True:
        i += 1
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.fill_(i)
        medpeft.save(model, path, metadata={{"i": i}})
        if i == 1:
            os.write(started, b"x")

def check():
    model = medpeft.load(Small(), path)
    i = medpeft.inspect(path).metadata["i"]
    assert all(bool((p == i).all()) for p in model.parameters() if p.requires_grad), i

draw = random.Random(0)
import safetensors.torch
for kill in range({KILLS}):
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        keep_saving(there)
    os.close(there)
    assert os.read(here, 1), "nothing could be saved"
    time.sleep(draw.random() * 0.012)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(here)
    check()
print(sum(name.endswith(".tmp") for name in os.listdir(folder)))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_killed_while_it_saves_leaves_a_whole_file(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLING, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": IMPORTABLE},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > KILLS // 20, "hardly any was killed between the first byte and the renaming"
