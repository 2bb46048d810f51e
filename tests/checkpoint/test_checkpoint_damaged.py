"""Damaged files and hostile headers: an error or the exact values, nothing between."""

import gc
import json
import random
import struct

import pytest
from golden.model import base_of
from places import TESTS
from small_checkpoints import attempt, saved_small, summary_is_whole_or_refused

import medpeft
from medpeft.checkpoint.file import MAX_DEPTH, MAX_HEADER, parse


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return saved_small(tmp_path_factory.mktemp("whole") / "a.safetensors")


def test_flipped_bytes_never_load_other_values(whole):
    data, expected = whole
    assert attempt(data, expected)
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
    "deep below the limit of python": with_header(
        '{"__metadata__":{"medpeft":' + "[" * 200 + "]" * 200 + "}}"
    ),
    "many empty lists": with_header("[" + "[]," * (MAX_HEADER // 3 - 10) + "[]]"),
    "the same key twice": with_header('{"a": 1, "a": 2}'),
    "not a number": with_header('{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}'),
    "infinite": with_header('{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 4]}}'),
    "lone surrogate": with_header(
        '{"\\ud800": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}', bytes(4)
    ),
    "metadata no object": with_header('{"__metadata__": 3}'),
    "metadata no text": with_header('{"__metadata__": {"medpeft": {}}}'),
    "no document": with_header('{"__metadata__": {"format": "pt"}}'),
    "document no JSON": with_header('{"__metadata__": {"medpeft": "hello"}}'),
    "document deep": with_header(json.dumps({"__metadata__": {"medpeft": "[" * 90_000}})),
    "later schema": with_header(json.dumps({"__metadata__": {"medpeft": '{"schema": 3}'}})),
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


@pytest.fixture
def _own_garbage():
    """Collect what a load makes: what pytest and torch hold is walked through again and again otherwise."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("_own_garbage")
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused(case, whole):
    summary_is_whole_or_refused(HOSTILE[case])
    assert not attempt(HOSTILE[case], whole[1])


def test_json_is_finite_and_of_limited_depth():
    deepest = [2.5]
    for level in range(MAX_DEPTH - 1):
        deepest = {"a": deepest} if level % 2 else [deepest]
    assert parse(json.dumps(deepest), "it") == deepest
    with pytest.raises(medpeft.CheckpointError, match=f"nested deeper than {MAX_DEPTH} levels"):
        parse(json.dumps([1, deepest, []]), "it")
    for number in ("1e999", "-1e999"):
        with pytest.raises(medpeft.CheckpointError, match=f"{number} is no finite number"):
            parse(f"[{number}]", "it")


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_entries_that_lie_about_their_size_are_refused(entry, whole):
    for header in ({"a": entry}, {"a": entry, "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}):
        data = with_header(json.dumps(header), bytes(4))
        with pytest.raises(medpeft.CheckpointError):
            medpeft.inspect(data)
        assert not attempt(data, whole[1])


def test_the_golden_base_refuses_every_golden_file_with_one_byte_changed():
    draw = random.Random(3)
    for path in sorted((TESTS / "golden" / "schema1").glob("*.safetensors")):
        if path.stem == "outputs":
            continue
        data = bytearray(path.read_bytes())
        data[draw.randrange(len(data) - 200, len(data))] ^= 0x10  # among the tensors
        with pytest.raises(medpeft.CheckpointError):
            medpeft.load(base_of(path.stem), bytes(data))
