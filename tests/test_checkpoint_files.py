"""Damaged and hostile files, and processes killed while they write: an error or the exact values, nothing between."""

import json
import os
import random
import resource
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from golden.model import Golden
from safetensors.torch import load_file
from torch import nn

import medpeft
from medpeft.file import MAX_HEADER, write
from medpeft.header import KEY, compose

HERE = Path(__file__).parent


class Small(nn.Module):
    """A few tensors of every kind that a file holds, so that thousands of loads are quick."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2)
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.fill_(i + 1.0)

    def forward(self, x):
        return self.head(self.norm(self.body(x)))


def adapted():
    return medpeft.apply(Small(), {"lora": {"rank": 2, "target": "body"}, "bn": {}}, batchnorm="adapt")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a good file, and the tensors in it."""
    path = tmp_path_factory.mktemp("whole") / "a.safetensors"
    model = adapted()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5)
    medpeft.save(model, path, metadata={"classes": ["benign", "malignant"], "note": "µ-scans"})
    return path.read_bytes(), load_file(path)


def attempt(data, expected):
    """Load bytes onto a base and into an adapted model: each is loaded exactly, or refused and untouched."""
    for fresh in (True, False):
        model = Small() if fresh else adapted()
        before = {name: t.clone() for name, t in model.state_dict().items()}
        started = time.process_time()
        try:
            medpeft.load(model, data)
        except medpeft.CheckpointError as error:
            str(error).encode()
            after = model.state_dict()
            assert list(after) == list(before)
            assert all(torch.equal(t, after[name]) for name, t in before.items())
            loaded = False
        else:
            after = model.state_dict()
            assert all(torch.equal(t, after[name]) for name, t in expected.items())
            loaded = True
        # Its own seconds, on any machine: a header must not cost more than its size allows.
        assert time.process_time() - started < 30
    return loaded


def summary_is_whole_or_refused(data):
    """`inspect` too raises nothing else, and what it shows is text."""
    try:
        shown = medpeft.inspect(data)
    except medpeft.CheckpointError:
        return
    str(shown).encode()
    json.dumps(shown.to_dict())


def test_flipped_bytes_never_load_other_values(whole):
    data, expected = whole
    draw = random.Random(0)
    loads = 0
    for _ in range(2500):
        damaged = bytearray(data)
        for _ in range(draw.choice((1, 1, 1, 2, 8))):
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        summary_is_whole_or_refused(bytes(damaged))
        loads += attempt(bytes(damaged), expected)
    assert loads < 125, "a flipped bit may be one that means nothing, but few are"


def test_files_cut_off_or_grown_anywhere_are_refused(whole):
    data, expected = whole
    for end in [*range(400), *range(400, len(data), 13)]:
        summary_is_whole_or_refused(data[:end])
        assert not attempt(data[:end], expected)
    draw = random.Random(1)
    for _ in range(100):
        start, size = draw.randrange(len(data)), draw.randrange(1, 64)
        assert not attempt(data[:start] + data[start + size :], expected)
        assert not attempt(data[:start] + draw.randbytes(size) + data[start:], expected)


def with_header(text, tail=b""):
    """A file with any text as its header."""
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw + tail


HOSTILE = {
    "empty": b"",
    "zeros": bytes(64),
    "random": random.Random(2).randbytes(4096),
    "a pickle": b"\x80\x04\x95" + bytes(100),
    "a zip": b"PK\x03\x04" + bytes(100),
    "huge header": struct.pack("<Q", 2**63) + b"{}",
    "long header": struct.pack("<Q", MAX_HEADER + 1) + b" " * (MAX_HEADER + 1),
    "header of one byte": with_header("{"),
    "no object": with_header("[]"),
    "a number": with_header("1" * 5000),
    "not utf-8": with_header(b'{"\xff\xfe": 1}'),
    "deep lists": with_header("[" * 100_000 + "]" * 100_000),
    "deep objects": with_header('{"a":' * 50_000 + "1" + "}" * 50_000),
    "deep below the limit of python": with_header('{"__metadata__":{"medpeft":' + "[" * 200 + "]" * 200 + "}}"),
    "many empty lists": with_header("[" + "[]," * (MAX_HEADER // 3 - 10) + "[]]"),
    "the same key twice": with_header('{"a": 1, "a": 2}'),
    "not a number": with_header('{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}'),
    "infinite": with_header('{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 4]}}'),
    "lone surrogate": with_header('{"\\ud800": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}', bytes(4)),
    "metadata no object": with_header('{"__metadata__": 3}'),
    "metadata no text": with_header('{"__metadata__": {"medpeft": {}}}'),
    "no document": with_header('{"__metadata__": {"format": "pt"}}'),
    "document no JSON": with_header('{"__metadata__": {"medpeft": "hello"}}'),
    "document deep": with_header(json.dumps({"__metadata__": {"medpeft": "[" * 90_000}})),
    "later schema": with_header(json.dumps({"__metadata__": {"medpeft": '{"schema": 2}'}})),
    "no schema": with_header(json.dumps({"__metadata__": {"medpeft": '{"schema": true}'}})),
}

ENTRIES = [
    {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]},
    {"dtype": "F32", "shape": [2**47, 2**47, 0], "data_offsets": [0, 0]},
    {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]},
    {"dtype": "F32", "shape": [2**70], "data_offsets": [0, 2**72]},
    {"dtype": "F32", "shape": [1] * 70, "data_offsets": [0, 4]},
    {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
    {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
    {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]},
    {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
    {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]},
    {"dtype": "F32", "shape": [1], "data_offsets": [1, 5]},
    {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]},
    {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]},
    {"shape": [1], "data_offsets": [0, 4]},
    {},
    [],
    None,
    "F32",
]


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused(case, whole):
    summary_is_whole_or_refused(HOSTILE[case])
    assert not attempt(HOSTILE[case], whole[1])


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_entries_that_lie_about_their_size_are_refused(entry, whole):
    for header in ({"a": entry}, {"a": entry, "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}):
        data = with_header(json.dumps(header), bytes(4))
        with pytest.raises(medpeft.CheckpointError):
            medpeft.inspect(data)
        assert not attempt(data, whole[1])


def forged(whole, path, **changes):
    """A file with another document and good digests, as one who knows the format can write it."""
    data, tensors = whole
    said = medpeft.inspect(data).document | changes
    said.pop("content")
    write(str(path), tensors, {KEY: compose(said, tensors)})
    return path.read_bytes()


ODD = [
    None,
    True,
    -1,
    0,
    10**30,
    1e308,
    "",
    "x",
    "a\x1b[31m\ud800",
    [],
    [[]],
    [None],
    {},
    {"x": {}},
    {"x": None},
    [["a", "b", "c"]],
]


def test_forged_documents_load_exactly_or_are_refused(whole, tmp_path):
    said = medpeft.inspect(whole[0]).document
    tried = 0
    for field in said:
        for value in ODD:
            if field in ("content", "schema") or said[field] == value:
                continue
            data = forged(whole, tmp_path / "f", **{field: value})
            summary_is_whole_or_refused(data)
            attempt(data, whole[1])
            tried += 1
    for part in said["base"]:
        for value in ODD:
            data = forged(whole, tmp_path / "f", base=said["base"] | {part: value})
            summary_is_whole_or_refused(data)
            attempt(data, whole[1])
            tried += 1
    assert tried > 250


def test_forged_options_are_refused_without_memory_or_time(whole, tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    options = medpeft.inspect(whole[0]).methods["lora"]
    tried = 0
    for option in options:
        for value in [*ODD, 10**9, 2**62, 2**63, -(10**12), 10**400, "8"]:
            methods = {"lora": options | {option: value}, "bn": {}}
            attempt(forged(whole, tmp_path / "f", methods=methods), whole[1])
            tried += 1
    for methods in (
        {"lora": {}},
        {"lra": {}, "bn": {}},
        {"lora": {"rang": 2}, "bn": {}},
        {"ssf": {}, "bn": {}},
        {"bn": {"x": 1}},
    ):
        assert not attempt(forged(whole, tmp_path / "f", methods=methods), whole[1])
        tried += 1
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB on Linux
    assert tried > 150
    assert grown < 300 * 1024


def test_forged_names_never_reach_other_tensors(whole, tmp_path):
    said = medpeft.inspect(whole[0]).document
    own = "body.adapters.lora.down"
    for changes in (
        {"selected": said["selected"] | {own: "bn"}},
        {"selected": said["selected"] | {"body.weight": "bn"}},
        {"selected": said["selected"] | {"": "bn"}},
        {"selected": {}},
        {"sites": said["sites"] * 2 + [["lora", "head", "weight"]]},
        {"sites": [["bn", "body", "weight"]]},
        {"sites": [["lora", "", "weight"]]},
        {"sites": []},
        {"head": ["body"]},
        {"head": [""]},
        {"head": ["nowhere"]},
        {"head": []},
        {"batchnorm": "frozen"},
        {"dtype": "int8"},
        {"dtype": "float16"},
    ):
        for head in ("strict", "skip", "reinit"):
            for model in (Small(), adapted()):
                data = forged(whole, tmp_path / "f", **changes)
                before = {name: t.clone() for name, t in model.state_dict().items()}
                try:
                    medpeft.load(model, data, head=head, check_base=False)
                except medpeft.CheckpointError:
                    after = model.state_dict()
                    assert list(after) == list(before)
                    assert all(torch.equal(t, after[name]) for name, t in before.items())
                else:
                    assert torch.equal(model.body.weight, before["body.weight"])
                    assert set(medpeft.remove(model).state_dict()) == set(Small().state_dict())


def test_things_that_are_no_files_are_refused(whole, tmp_path):
    for path in (tmp_path, tmp_path / "nothing", "\0", "", os.devnull):
        with pytest.raises(medpeft.CheckpointError):
            medpeft.load(Small(), path)
        with pytest.raises(medpeft.CheckpointError):
            medpeft.inspect(path)


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


KILLS = 300

KILLING = f"""
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
import medpeft
from test_checkpoint_files import Small, adapted

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
    os.read(here, 1)
    time.sleep(draw.random() * 0.012)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(here), os.close(there)
    check()
print(sum(name.endswith(".tmp") for name in os.listdir(folder)))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_killed_while_it_saves_leaves_a_whole_file(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLING, str(tmp_path)], cwd=HERE, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > KILLS // 20, "hardly any was killed between the first byte and the renaming"


def test_the_golden_base_refuses_every_golden_file_with_one_byte_changed():
    draw = random.Random(3)
    for path in sorted((HERE / "golden" / "schema1").glob("*.safetensors")):
        if path.stem == "outputs":
            continue
        data = bytearray(path.read_bytes())
        data[draw.randrange(len(data) - 200, len(data))] ^= 0x10  # among the tensors
        with pytest.raises(medpeft.CheckpointError):
            medpeft.load(Golden(), bytes(data))
