"""The code is plain, and its rooms stand in order: bars that are counted, so that nobody has to argue about them."""

import ast
from pathlib import Path

import pytest
from places import ROOT
from torch import nn

import medpeft
from medpeft.architecture.site import Site

PACKAGE = ROOT / "medpeft"
ROOMS = (
    "architecture", "adapters", "formulas", "surgery", "checks", "reports", "checkpoint", "combining", "features",
    "interchange", "serving",
)  # fmt: skip
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def files(folder):
    return sorted((ROOT / folder).rglob("*.py"))


def nodes(path):
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def per_100_lines(folder, kinds):
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files(folder))
    return 100 * sum(isinstance(node, kinds) for path in files(folder) for node in nodes(path)) / lines


@pytest.mark.parametrize("folder", ["medpeft", "benchmarks", "examples"])
def test_code_is_not_pressed(folder):
    assert per_100_lines(folder, COMPREHENSIONS) <= 2.5
    assert per_100_lines(folder, ast.IfExp) <= 1.5
    for path in files(folder):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 300, path
        assert max(map(len, lines), default=0) <= 110, path
        for node in nodes(path):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno - node.body[0].lineno <= 40, f"{path}: {node.name}"


def place(path):
    """Room of a file, or the file itself where it stands at the top."""
    inside = path.relative_to(PACKAGE)
    return inside.parts[0].removesuffix(".py")


def imports():
    """By place, the places that it imports."""
    found = {place(path): set() for path in files("medpeft")}
    for path in files("medpeft"):
        package = ["medpeft", *path.relative_to(PACKAGE).parent.parts]
        for node in nodes(path):
            names = []
            if isinstance(node, ast.ImportFrom) and node.level:
                base = package[: len(package) - node.level + 1] + (node.module or "").split(".")
                names = [base] if node.module else [[*base[:-1], alias.name] for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module or "").split(".")]
            for name in names:
                if (
                    len(name) > 1
                    and name[0] == "medpeft"
                    and (PACKAGE / name[1]).is_dir() | (PACKAGE / f"{name[1]}.py").is_file()
                ):
                    found[place(path)].add(name[1])
    return {name: targets - {name} for name, targets in found.items()}


def test_rooms_stand_on_seven_floors_at_most_and_in_no_circle():
    below, floors = imports(), {}
    while len(floors) < len(below):
        ready = [name for name in below if name not in floors and below[name] <= floors.keys()]
        assert ready, f"a circle among {below.keys() - floors.keys()}"
        for name in ready:
            floors[name] = 1 + max((floors[other] for other in below[name]), default=0)
    assert max(floors.values()) <= 7, floors
    assert set(ROOMS) <= floors.keys()


def test_formulas_and_surgery_do_not_know_each_other():
    below = imports()
    assert "surgery" not in below["formulas"]
    assert "formulas" not in below["surgery"]
    assert below["architecture"] <= {"errors"}


def test_every_room_says_in_one_sentence_what_it_is():
    for room in ROOMS:
        text = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8")))
        assert text, room
        assert len(text.split(".")[0].splitlines()) == 1, room


def test_an_adapter_and_a_site_are_small():
    own = {name for name in vars(medpeft.Adapter) if not name.startswith("_")}
    model = medpeft.apply(nn.Sequential(nn.Linear(2, 2)), "ssf", head=None)
    adapter = next(adapter for _, adapter in model[0].adapters.adapters())
    plain = nn.Module()
    instance = {name for name in vars(adapter) if not name.startswith("_") and name not in vars(plain)}
    base = instance & {"method", "acts_on", "shared"}
    assert own | base == {"layers", "sites", "enter", "forward", "merged", "method", "acts_on", "shared"}
    assert len(Site.__dataclass_fields__) <= 9


def test_no_public_name_hides_a_module():
    for name in dir(medpeft):
        if not name.startswith("_") and callable(getattr(medpeft, name)):
            assert not (Path(medpeft.__file__).parent / name).exists(), name
            assert not (Path(medpeft.__file__).parent / f"{name}.py").exists(), name
