"""An exchange by Flower's messages, in this process: it learns, it refuses by name, what is local stays."""

import copy
import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageOps

pytest.importorskip("flwr", reason="needs the extra 'federated'")

from federated import command
from federated.client import LOCAL
from federated.messages import arrays_of, record_of, site_of
from federated.server import Exchange
from federated.settings import Settings
from federated.training import make_model
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from small_federation import client, run_here
from trainer.errors import TrainerError

import medpeft

TINY = {"model": "test_efficientnet", "no_pretrained": True, "image_size": 32, "rounds": 2, "augment": "none"}


def settings(folder, **given):
    return Settings.of(TINY | {"output": str(folder)} | given)


def rounds(folder):
    return pd.read_csv(folder / "rounds.csv", keep_default_na=False)


@pytest.fixture(scope="module")
def two_folders(stripes, tmp_path_factory):
    """Stripes at one site, and at the other their negatives."""
    other = tmp_path_factory.mktemp("negatives")
    for path in stripes.rglob("*.png"):
        own = other / path.relative_to(stripes)
        own.parent.mkdir(exist_ok=True)
        ImageOps.invert(Image.open(path)).save(own)
    return {"site_data": f"{stripes},{other}"}


def test_the_common_adapter_is_the_average_of_what_the_sites_sent(two_folders, tmp_path):
    own = settings(tmp_path, average="mean", rounds=1, **two_folders)
    sent = []
    run_here(own, spoil=lambda reply, _: sent.append(reply))
    arrays = [arrays_of(reply.content["arrays"]) for reply in sent if "arrays" in reply.content]
    assert len(arrays) == 2
    model = medpeft.load(make_model(own, ["across", "down"]), tmp_path / "adapter.safetensors")
    for name, tensor in medpeft.state(model, numpy=True).items():
        np.testing.assert_allclose(tensor, (arrays[0][name] + arrays[1][name]) / 2, atol=1e-6)
    table = rounds(tmp_path)
    assert table["error"][0] == table["error_of_mean"][0] > 1e-4
    assert pd.read_csv(tmp_path / "sites.csv")["site"].tolist() == ["A", "B"]


@pytest.mark.parametrize("average", ["products", "frozen_a"])
def test_every_average_says_how_exact_it_is(average, two_folders, tmp_path):
    run_here(settings(tmp_path, average=average, **two_folders))
    table = rounds(tmp_path)
    assert table["sites"].tolist() == ["A B", "A B"]
    assert table["refused"].tolist() == ["", ""]
    first, second = table["error_of_mean"], table["error"]
    if average == "products":
        assert (second < first).all()
        assert (first > 1e-4).all()
    if average == "frozen_a":
        assert (first < 1e-6).all()


@pytest.fixture(scope="module")
def first_round(two_folders, tmp_path_factory):
    """The settings of an exchange, the coordinator's model, and what the sites sent in its first round."""
    own = settings(tmp_path_factory.mktemp("first"), rounds=1, least=1, **two_folders)
    sent = []
    run_here(own, spoil=lambda reply, _: sent.append(reply))
    return own, make_model(own, ["across", "down"]), sorted(sent[:2], key=site_of)


def not_finite(reply):
    arrays = arrays_of(reply.content["arrays"])
    arrays["classifier.bias"][:] = np.nan
    reply.content["arrays"] = record_of(arrays)


def unreadable(reply):
    reply.content["arrays"]["classifier.bias"].data = b"\x93NUMPY"


def other_base(reply):
    reply.content["about"]["base"] = "0123"


def nothing(reply):
    del reply.content["metrics"]


def twice(reply):
    reply.content["about"]["site"] = "A"


FAULTS = {
    not_finite: "B: 'classifier.bias' in the state has values that are not finite",
    unreadable: "B: ",
    other_base: "B: its base has the digest 0123",
    nothing: "B: 'metrics'",
    twice: "A: another node has this name",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_site_that_is_not_in_order_is_left_out_of_its_round_by_name(fault, first_round):
    own, model, replies = first_round
    replies = copy.deepcopy(replies)
    alone = arrays_of(replies[0].content["arrays"])
    fault(replies[1])
    exchange = Exchange(model, own)
    common, _ = exchange.aggregate_train(1, replies)
    assert exchange.rounds[0]["sites"] == "A"
    assert exchange.rounds[0]["refused"].startswith(FAULTS[fault])
    assert exchange.rounds[0]["error"] < 1e-6
    assert np.allclose(arrays_of(common)["classifier.bias"], alone["classifier.bias"])


def test_a_site_that_was_left_out_takes_part_in_the_next_round(two_folders, tmp_path):
    met = []

    def spoil(reply, node):
        met.append(node["partition-id"])
        if met.count(1) == 1 and met[-1] == 1:
            other_base(reply)

    run_here(settings(tmp_path, least=1, **two_folders), spoil)
    assert rounds(tmp_path)["sites"].tolist() == ["A", "A B"]
    assert rounds(tmp_path)["refused"][1] == ""


def test_a_round_with_too_few_sites_fails_names_them_and_keeps_the_common_state(first_round):
    own, model, replies = first_round
    replies = copy.deepcopy(replies)
    other_base(replies[1])
    exchange = Exchange(model, dataclasses.replace(own, least=2))
    before = medpeft.state(model)
    with pytest.raises(
        TrainerError, match=r"Round 1 fails: 1 sites are in order, and --least is 2\. B: its base"
    ):
        exchange.aggregate_train(1, replies)
    assert all(torch.equal(before[name], tensor) for name, tensor in medpeft.state(model).items())


def test_a_local_head_never_leaves_its_site_and_goes_on_from_round_to_round(two_folders, tmp_path):
    own = settings(tmp_path, local="head,batchnorm", batchnorm="adapt", **two_folders)
    grid = run_here(own)
    for message in grid.sent:
        names = " ".join(message.content["arrays"])
        assert "classifier" not in names
        assert "bn" not in names
    heads = []
    for name, context in zip("AB", grid.contexts.values(), strict=True):
        model = medpeft.load(make_model(own, ["across", "down"]), tmp_path / "sites" / f"{name}.safetensors")
        heads.append(model.classifier.weight)
        kept = arrays_of(context.state[LOCAL])
        assert np.array_equal(kept["classifier.weight"], heads[-1].detach().numpy())
        assert kept["bn1.num_batches_tracked"] == 2 * 2
    common = medpeft.load(make_model(own, ["across", "down"]), tmp_path / "adapter.safetensors")
    assert not torch.equal(heads[0], common.classifier.weight)


def test_a_real_site_says_itself_where_its_images_are(stripes, tmp_path):
    own = settings(tmp_path / "not here", classes="across,down", rounds=1)
    model = make_model(own, ["across", "down"])
    config = ConfigRecord({**own.message(), "server-round": 1})
    arrays = record_of(medpeft.state(model, numpy=True))
    message = Message(
        RecordDict({"arrays": arrays, "config": config}), message_type="evaluate", dst_node_id=7
    )
    node = {"site": "North", "data": str(stripes), "output": str(tmp_path / "mine")}
    reply = client.app(message, Context(1, 7, node, RecordDict(), {}))
    assert reply.content["about"]["site"] == "North"
    assert reply.content["metrics"]["num-examples"] == 8
    adapter = tmp_path / "mine" / "sites" / "North.safetensors"
    assert medpeft.inspect(adapter).classes == ["across", "down"]
    assert not (tmp_path / "not here").exists()
    for left_out in ("site", "output"):
        known = {name: value for name, value in node.items() if name != left_out}
        with pytest.raises(TrainerError, match=f"The node has no '{left_out}'"):
            client.app(message, Context(1, 7, known, RecordDict(), {}))


def test_the_table_compares_each_site_alone_the_exchange_and_the_pool(
    two_folders, tmp_path, monkeypatch, capsys
):
    # Flower's own simulation needs Ray and a process for each site, which takes a minute.
    monkeypatch.setattr(command, "simulate", run_here)
    words = ["--model", "test_efficientnet", "--no-pretrained", "--image-size", "32", "--rounds", "1"]
    words += ["--site-data", *two_folders["site_data"].split(","), "--option", "rank=2"]
    assert command.main([*words, "--output", str(tmp_path)]) == 0
    table = pd.read_csv(tmp_path / "comparison.csv")
    assert table["training"].tolist() == ["A alone", "B alone", "federated", "pooled"]
    names = [f"{score} {site}" for score in ("macro_f1", "auroc") for site in ("A", "B", "all")]
    assert list(table.columns) == ["training", *names]
    assert table[names].ge(0).all(axis=None)
    assert table[names].le(1).all(axis=None)
    assert "A 16 + 4 16 + 4" in " ".join(capsys.readouterr().out.split())
    assert medpeft.inspect(tmp_path / "adapter.safetensors").methods["lora"]["rank"] == 2
    federated = pd.read_csv(tmp_path / "sites.csv")
    assert federated["site"].tolist() == ["A", "B"]
    assert federated["macro_f1"].tolist() == pytest.approx(table.loc[2, names[:2]].tolist())


def test_a_mistake_is_one_line(capsys):
    assert command.main(["--method", "ssf"]) == 2
    assert capsys.readouterr().err.startswith("federated.py: --average products is for --method lora alone")


def test_what_are_no_arrays_is_refused():
    with pytest.raises(TypeError, match="no arrays"):
        arrays_of(ConfigRecord({"a": 1}))
    assert arrays_of(ArrayRecord()) == {}
