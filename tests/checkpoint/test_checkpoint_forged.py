"""Files forged by one who knows the format: an error or the exact values, nothing between."""

import resource

import pytest
import torch
from small_checkpoints import Small, adapted, attempt, saved_small, summary_is_whole_or_refused
from torch import nn

import medpeft
from medpeft.adapters.record import Adapted
from medpeft.checkpoint.header import KEY, compose
from medpeft.checkpoint.writing import write


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return saved_small(tmp_path_factory.mktemp("whole") / "a.safetensors")


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


def test_forged_options_by_place_are_exact_or_refused(whole, tmp_path):
    options = medpeft.inspect(whole[0]).methods["lora"]
    for value in (
        {"body": 2},
        {"body": 3},
        {"*": 2},
        {"body": 2, "head": 2},
        {},
        {"body": {"body": 2}},
        {"body": 10**9},
    ):
        methods = {"lora": options | {"rank": value}, "bn": {}}
        data = forged(whole, tmp_path / "f", methods=methods, schema=2)
        summary_is_whole_or_refused(data)
        loaded = attempt(data, whole[1])
        assert value == {"body": 2} or not loaded


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


def test_a_file_of_thousands_of_misfits_makes_a_short_message(whole, tmp_path):
    data, tensors = whole
    said = medpeft.inspect(data).document
    said.pop("content")
    many = tensors | {f"{i}{'x' * 900}": torch.zeros(1) for i in range(3000)}
    write(str(tmp_path / "tensors"), many, {KEY: compose(said, many)})
    forged(whole, tmp_path / "selected", selected={f"{i}{'x' * 900}\n": "bn" for i in range(3000)})
    forged(whole, tmp_path / "sites", sites=[["lora", f"{i}{'x' * 900}", "weight"] for i in range(3000)])
    forged(whole, tmp_path / "methods", methods={"x" * 100_000: {}})
    forged(
        whole,
        tmp_path / "options",
        methods={"lora": {f"{i}{'x' * 900}\n": "bn" for i in range(3000)}, "bn": {}},
    )
    tensors_of_base = {f"{i}{'x' * 900}": "3 float32 ab" for i in range(3000)}
    forged(whole, tmp_path / "base", base=said["base"] | {"tensors": tensors_of_base})
    for path in tmp_path.iterdir():
        for model in (Small(), adapted()):
            for check_base in (True, False):
                if path.name == "base" and not check_base:
                    continue
                with pytest.raises(medpeft.CheckpointError) as caught:
                    medpeft.load(model, path, check_base=check_base)
                message = str(caught.value)
                assert len(message) < 5000, path.name
                assert message.count("\n") < 20, path.name


@pytest.mark.parametrize(
    ("method", "option", "value"),
    [("svdiff", "scale", "x"), ("svdiff", "scale", [1]), ("vera", "parts", 3), ("vera", "d_initial", 1e308),
     ("lora", "rank", 10**20), ("lora", "dora", 1), ("vera", "rank", 2.0)],
)  # fmt: skip
def test_options_in_a_file_are_checked_as_arguments_are(method, option, value, tmp_path):
    def model():
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))

    donor = medpeft.apply(model(), method, target="0", head="1")
    medpeft.save(donor, tmp_path / "a")
    document = medpeft.inspect(tmp_path / "a").document
    document.pop("content")
    document["methods"][method][option] = value
    tensors = {name: t.detach() for name, t in Adapted.of(donor).saved.items()}
    write(str(tmp_path / "forged"), tensors, {KEY: compose(document, tensors)})
    with pytest.raises(medpeft.CheckpointError, match=f"'{method}': {option}="):
        medpeft.load(model(), tmp_path / "forged")


def test_a_small_file_cannot_ask_for_large_projections(tmp_path):
    def model():
        return nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 2))

    rank = 50_000
    medpeft.save(medpeft.apply(model(), "vera", rank=4, target="0", head="1"), tmp_path / "a")
    header = medpeft.inspect(tmp_path / "a")
    document = {key: value for key, value in header.document.items() if key != "content"}
    document["methods"]["vera"]["rank"] = rank
    tensors = {}
    for name, entry in header.tensors.items():
        tensors[name] = torch.zeros(rank if name.endswith(".d") else entry.shape, dtype=entry.dtype)
    write(str(tmp_path / "bomb"), tensors, {KEY: compose(document, tensors)})
    message = (
        "asks for adapters with 25,600,000 numbers beside those that it holds, and this Sequential has 66,306"
    )
    with pytest.raises(medpeft.CheckpointError, match=message):
        medpeft.load(model(), tmp_path / "bomb", check_base=False)
