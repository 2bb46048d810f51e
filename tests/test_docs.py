"""The documentation is right: examples run, links lead somewhere, lists are complete."""

import re
import tomllib
from importlib.metadata import version

import pytest
import timm
import torch
from models import on_meta
from places import ROOT

import medpeft
from medpeft.adapters import registry

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def read(page):
    return page.read_text(encoding="utf-8")


WITH_PYTHON = [page for page in PAGES if "```python" in read(page)]


def built_in():
    """The methods of the package, without those that other tests may have registered."""
    methods = registry._METHODS.items()
    return {name: m for name, m in methods if m.define.__module__.startswith("medpeft.")}


def names(pages):
    return [str(page.relative_to(ROOT)) for page in pages]


def python_blocks(page):
    """Each python block, after as many empty lines as make a traceback show the page's own."""
    text = read(page)
    for match in re.finditer(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE):
        line = text.count("\n", 0, match.start(1))
        yield "\n" * line + match.group(1)


def anchors(page):
    """The anchors that mkdocs gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", read(page), flags=re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", heading) for heading in headings)
    return {heading.strip().lower().replace(" ", "-") for heading in plain}


@pytest.fixture
def small_models(monkeypatch, tmp_path):
    """`timm.create_model` draws the same weights each time, without a network, for small ViTs."""
    monkeypatch.chdir(tmp_path)
    create = timm.create_model

    def stand_in(name, pretrained=False, **options):
        depth = {"depth": 2} if name.startswith("vit") else {}
        torch.manual_seed(0)
        return create(name, **depth, **options)

    monkeypatch.setattr(timm, "create_model", stand_in)


@pytest.fixture
def own_registry(monkeypatch):
    """Methods that a page registers stay in its test."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))


@pytest.mark.usefixtures("small_models", "own_registry")
@pytest.mark.parametrize("page", WITH_PYTHON, ids=names(WITH_PYTHON))
def test_examples_of_a_page_run_in_order(page):
    namespace = {"__name__": "page"}
    for block in python_blocks(page):
        exec(compile(block, page, "exec", dont_inherit=True), namespace)


@pytest.mark.usefixtures("small_models")
def test_the_readme_opens_with_an_example_that_applies_ssf():
    namespace = {}
    exec(next(python_blocks(ROOT / "README.md")), namespace)

    assert medpeft.report(namespace["model"]).method == "ssf"


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_of_a_page_lead_to_a_file_and_a_heading(page):
    text = re.sub(r"^```.*?^```$", "", read(page), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), f"{link} in {page.name} leads nowhere"
        assert not anchor or anchor in anchors(target), f"{link} in {page.name}: no such heading"


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"([\w/-]+\.md)$", read(ROOT / "mkdocs.yml"), flags=re.MULTILINE)
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in PAGES[1:]]

    assert sorted(listed) == sorted(pages)


def test_the_tree_in_how_it_works_has_every_file_of_the_package_once_each_with_its_line():
    tree = re.search(
        r"^```text\nmedpeft/\n(.*?)^```$", read(ROOT / "docs/how-it-works.md"), re.DOTALL | re.MULTILINE
    )
    assert tree is not None

    listed, room = [], ""
    for line in tree.group(1).splitlines():
        branch, name, text = re.fullmatch(r"([│ ]*[├└]?)(?: ([\w.]+/?) +(.+))?", line).groups()
        if name and name.endswith("/"):
            room = name
        elif name:
            listed.append(name if len(branch) == 1 else room + name)
            assert text
    package = ROOT / "medpeft"
    files = [path.relative_to(package).as_posix() for path in package.rglob("*.py")]
    assert sorted(listed) == sorted(file for file in files if not file.endswith("/__init__.py"))


def test_every_method_has_a_row_in_the_overview_and_in_the_readme():
    for page in (ROOT / "docs/methods/index.md", ROOT / "README.md"):
        first_cells = re.findall(r"^\| (.*?) \|", read(page), flags=re.MULTILINE)
        listed = re.findall(r"`(\w+)`", "\n".join(first_cells))
        assert set(built_in()) - set(listed) == set(), page.name


def test_every_option_of_a_method_is_in_its_page():
    pages = dict(
        re.findall(r"^\| \[`(\w+)`\]\((\w+\.md)", read(ROOT / "docs/methods/index.md"), flags=re.MULTILINE)
    )
    for name, method in built_in().items():
        text = read(ROOT / "docs/methods" / pages[name])
        for option in method.options:
            assert f"| `{option}` |" in text, f"the option {option!r} of {name!r}"


def test_every_public_name_is_in_the_api_reference():
    listed = set(re.findall(r"^::: medpeft\..*?(\w+)$", read(ROOT / "docs/api.md"), re.MULTILINE))
    public = {name for name in vars(medpeft) if not name.startswith("_")}
    modules = {name for name in public if type(getattr(medpeft, name)) is type(medpeft)}

    assert public - modules == listed


def test_the_counts_of_the_overview_are_those_of_the_models():
    rows = re.findall(
        r"^\| \[?`(\w+)`.*?\| .*? \| ([\d,–]+) \| ([\d,–]+) \|",
        read(ROOT / "docs/methods/index.md"),
        flags=re.MULTILINE,
    )
    assert {name for name, *_ in rows} == set(built_in())

    for name, *counts in rows:
        for architecture, count in zip(("resnet50", "vit_base_patch16_224"), counts, strict=True):
            model = on_meta(architecture)
            if count == "–":
                with pytest.raises(medpeft.MedpeftError, match=name):
                    medpeft.plan(model, name)
                continue
            report = medpeft.report(medpeft.apply(model, name))
            assert f"{report.trainable - report.head:,}" == count, f"{name} on {architecture}"


def test_the_changelog_and_the_project_have_the_version_of_the_package():
    latest = re.search(r"^## \[(.+?)\]", read(ROOT / "CHANGELOG.md"), re.MULTILINE)
    project = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]

    assert latest is not None
    assert latest.group(1) == project["version"] == medpeft.__version__ == version("medpeft")
