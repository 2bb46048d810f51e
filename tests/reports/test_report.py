"""What the report says is what trains."""

import json
import re

import pytest
import torch
from models import make
from torch import nn

import medpeft
from medpeft.table import Row, Table


def test_the_report_counts_what_trains_per_method_and_layer_type():
    model = medpeft.apply(make("vit"), "lora+bias", rank=2)
    report = medpeft.report(model)

    assert report.method == "lora+bias"
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.total == sum(p.numel() for p in model.parameters())
    assert report.percent == 100 * report.trainable / report.total
    assert report.head == 16 * 3 + 3
    assert [(row.method, row.type, row.parameters) for row in report.rows] == [
        ("lora", "Linear", 2 * 2 * (2 * 16 + 2 * 16)),
        ("bias", "Conv2d", 16),
        ("bias", "LayerNorm", 5 * 16),
        ("bias", "Linear", 2 * (48 + 16 + 64 + 16)),
        ("head", "Linear", 51),
    ]
    assert sum(row.parameters for row in report.rows) == report.trainable


def test_the_bytes_are_those_of_the_tensors_that_a_checkpoint_holds():
    model = medpeft.apply(make("resnet", torch.float32), "ssf", batchnorm="adapt")
    statistics = sum(b.numel() * b.element_size() for b in model.buffers())
    report = medpeft.report(model)

    assert report.checkpoint_bytes == 4 * report.trainable + statistics


def test_the_text_is_aligned_with_a_total():
    lines = str(medpeft.report(medpeft.apply(make("vit"), "ssf"))).splitlines()

    assert lines[0] == "ssf on VisionTransformer"
    assert lines[2].split() == ["method", "type", "parameters"]
    table = lines[2:-1]
    assert {len(line) for line in table} == {len(table[0])}
    assert table[-1].split()[0] == "total"
    assert re.fullmatch(
        r"trainable [\d,]+ of [\d,]+ parameters \([\d.]+%\), 51 of them in the head; checkpoint [\d,]+ bytes",
        lines[-1],
    )


def test_the_report_is_plain_data_and_markdown():
    report = medpeft.report(medpeft.apply(make("vit"), "ssf"))
    plain = json.loads(json.dumps(report.to_dict()))

    assert plain["trainable"] == report.trainable
    assert plain["percent"] == report.percent
    assert plain["rows"][0] == {"method": "ssf", "layer": "", "type": "Conv2d", "parameters": 32}
    assert report.to_markdown().splitlines()[:3] == [
        "| method | type | parameters |", "| --- | --- | ---: |", "| ssf | Conv2d | 32 |"
    ]  # fmt: skip
    assert (
        medpeft.plan(make("vit"), "ssf")
        .table()
        .to_markdown()
        .startswith("| method | layer | type | parameters |\n")
    )


def test_markdown_escapes_what_it_shows():
    table = Table("t", [Row("<b>", "a|b", "two\nlines", 1)], notes=["a note\nof <i>"])

    assert table.to_markdown().splitlines()[2:] == [
        "| &lt;b> | a\\|b | two lines | 1 |", "| total |  |  | 1 |", "", "a note of &lt;i>"
    ]  # fmt: skip
    assert str(table).count("<b>") == 1


def test_an_adapter_that_is_larger_than_its_layer_is_warned_of():
    model = medpeft.apply(
        nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 64, 3)), "lora", head=None, rank=8
    )
    report = medpeft.report(model)

    assert report.warnings == ["lora has 136 parameters at 0, a Conv2d of 80"]
    assert "warning: lora has 136 parameters at 0, a Conv2d of 80" in str(report)


def test_many_such_warnings_are_counted():
    model = medpeft.apply(
        nn.Sequential(*(nn.Linear(2, 2) for _ in range(8))), "lora", head=None, target="*", rank=8
    )

    assert len(medpeft.report(model).warnings) == 6
    assert medpeft.report(model).warnings[-1] == "3 more adapters are larger than their layers"


def test_what_the_user_unfroze_later_has_a_row_of_its_own():
    model = medpeft.apply(make("vit"), "ssf")
    model.cls_token.requires_grad_(True)

    assert [(row.method, row.parameters) for row in medpeft.report(model).rows][-1] == ("unfrozen since", 16)


def test_a_model_that_is_not_adapted_has_no_report():
    with pytest.raises(medpeft.MedpeftError) as error:
        medpeft.report(make("vit"))
    assert (
        str(error.value) == "This VisionTransformer is not adapted: call medpeft.apply(model, method) first."
    )


def test_the_model_below_that_is_adapted_is_named():
    outer = nn.Sequential(medpeft.apply(make("vit"), "ssf"))

    with pytest.raises(medpeft.MedpeftError, match="This Sequential is not adapted: its '0' is: pass that"):
        medpeft.report(outer)


@pytest.mark.parametrize("method", ["lora", "bias+norm", "ssf+svdiff"])
def test_a_plan_lists_what_apply_then_trains(method):
    model = make("vit")
    planned = medpeft.plan(model, method)
    assert not any("adapters" in name for name, _ in model.named_modules())
    rows = planned.table().rows
    medpeft.apply(model, method)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}

    assert sum(row.parameters for row in rows) == planned.trainable == sum(trained.values())
    for row in rows:
        inside = [
            n
            for n, _ in trained.items()
            if n == row.layer or n.startswith(f"{row.layer}.adapters.{row.method}.")
        ]
        assert row.parameters == sum(trained[name] for name in inside), row
    assert str(planned).splitlines()[0] == f"{method} on VisionTransformer"
