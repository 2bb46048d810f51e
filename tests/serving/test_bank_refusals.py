"""What a bank refuses changes nothing: neither the model nor the bank."""

import copy
import functools
import io
import pickle

import numpy as np
import pytest
import torch
from banks import bank_of, file_of, images, sites
from checkpoints import bits, same
from golden.model import Golden
from safetensors.torch import load, save
from torch import nn

import medpeft


@pytest.fixture
def bank():
    return bank_of({"a": sites("lora", 1, rank=2)}, Golden().eval())


def refused(bank, error, words, *arguments, **keywords):
    """Add what must be refused, with nothing changed."""
    model = bank._base.model
    before, names, digests = bits(model), bank.names, bank.prove().to_dict()
    kept, output = set(bank._base.kept), bank(images(2), "a")
    with pytest.raises(error, match=words):
        bank.add(*arguments, **keywords)
    assert same(before, bits(model))
    assert (names, digests, kept) == (bank.names, bank.prove().to_dict(), set(bank._base.kept))
    assert torch.equal(bank(images(2), "a"), output)


def with_values(file, change):
    """A file with other values whose digests fit."""
    model = medpeft.load(Golden(), file)
    with torch.no_grad():
        change(model)
    return file_of(model)


@pytest.mark.parametrize("used", [None, "a"])
@pytest.mark.parametrize("method", ["lora", "bias", "ssf"])
def test_another_base(bank, method, used):
    bank.use(used)
    other = Golden()
    with torch.no_grad():
        other.stem.weight.add_(0.01)
    medpeft.apply(other, method)
    refused(
        bank, medpeft.CheckpointError, r"trained on another base[^=]*make another bank", "b", file_of(other)
    )


@pytest.mark.parametrize("method", ["lora", "bias"])
def test_values_that_are_not_finite(bank, method):
    file = with_values(file_of(sites(method, 1)), lambda model: model.head.bias.fill_(float("nan")))
    refused(bank, medpeft.CheckpointError, "values that are not finite", "b", file)


def foreign(width):
    """An adapter of the same base whose head has been given another form since."""
    model = sites("lora", 1, rank=2)
    tensors = medpeft.state(model)
    tensors["head.weight"] = torch.zeros(3, width)
    return tensors


def test_a_foreign_head(bank):
    refused(bank, medpeft.CheckpointError, "has another head", "b", foreign(5), like="a")
    other = Golden()
    other.head = nn.Linear(4, 3, bias=False)
    medpeft.apply(other, "lora", rank=2)
    refused(bank, medpeft.CheckpointError, "is not in the file's base", "b", file_of(other))
    uneven = medpeft.state(sites("lora", 1, rank=2))
    uneven["head.bias"] = torch.zeros(4)
    refused(bank, medpeft.CheckpointError, "has another head", "b", uneven, like="a")


def test_a_hostile_file(bank, tmp_path):
    whole = file_of(sites("ssf", 1)).getvalue()
    refused(bank, medpeft.CheckpointError, "altered", "b", whole[:-1] + bytes([whole[-1] ^ 1]))
    refused(bank, medpeft.CheckpointError, "cut off", "b", whole[:100])
    refused(bank, medpeft.CheckpointError, "not written by medpeft", "b", save(load(whole)))
    refused(bank, medpeft.CheckpointError, "no such file", "b", tmp_path / "none.safetensors")
    refused(bank, medpeft.CheckpointError, "must be the path", "b", 5)


def test_states_that_do_not_fit(bank):
    state = medpeft.state(sites("lora", 1, rank=2))
    refused(bank, medpeft.MedpeftError, "No adapter 'x' is in the bank", "b", state, like="x")
    refused(bank, medpeft.MedpeftError, "is not adapted", "b", state)
    refused(bank, medpeft.MedpeftError, "like='a' is for a state", "b", file_of(sites("ssf", 1)), like="a")
    refused(bank, medpeft.CheckpointError, "it has 'more'", "b", {**state, "more": torch.zeros(1)}, like="a")
    letters = {**state, "head.bias": np.full(3, "a")}
    refused(bank, medpeft.CheckpointError, "no array of numbers", "b", letters, like="a")
    refused(bank, medpeft.CheckpointError, "must be a dict", "b", {1: 2}, like="a")


def test_a_name_that_is_taken_or_none(bank):
    refused(bank, medpeft.MedpeftError, "is in the bank already", "a", file_of(sites("ssf", 1)))
    refused(bank, medpeft.MedpeftError, "must be text", "", file_of(sites("ssf", 1)))


def test_a_base_that_has_changed(bank):
    model = bank._base.model
    with torch.no_grad():
        model.stem.weight.add_(0.01)
    for call in (lambda: bank(images(1), "a"), lambda: bank.use("a")):
        with pytest.raises(medpeft.MedpeftError, match=r"'stem\.weight' was written to, moved or replaced"):
            call()
    assert not bank.prove().holds


def test_a_model_that_is_merged_moved_or_has_another_head(bank):
    model = bank._base.model
    bank.use("a")
    with medpeft.merged(model), pytest.raises(medpeft.MedpeftError, match="merged for the moment"):
        bank(images(1), "a")
    with medpeft.disabled(model):
        with pytest.raises(medpeft.MedpeftError, match="does not work inside disabled"):
            bank.use(None)
        assert bank(images(1), "a").shape == (1, 3)
    head, model.head = model.head, nn.Linear(4, 3)
    with pytest.raises(medpeft.MedpeftError, match=r"'head\.\w+' is not what the bank put 'a' into"):
        bank.use(None)
    model.head = head
    bank.use(None)
    model.double()
    with pytest.raises(medpeft.MedpeftError, match="moved or replaced"):
        bank(images(1), "a")


def test_calls_without_a_name_for_each_image_or_in_training(bank):
    with pytest.raises(medpeft.MedpeftError, match="1 names for 2 images"):
        bank(images(2), ["a"])
    with pytest.raises(medpeft.MedpeftError, match="as a tensor"):
        bank("x", ["a"])
    bank._base.model.train()
    with pytest.raises(medpeft.MedpeftError, match="in training mode"):
        bank(images(1), "a")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (3, "is no torch.nn.Module"),
        (nn.Linear(2, 2, device="meta"), "on the meta device"),
        (torch.compile(nn.Linear(2, 2)), "is compiled"),
    ],
)
def test_models_that_cannot_have_a_bank(model, words):
    with pytest.raises(medpeft.MedpeftError, match=words):
        medpeft.Bank(model)


def test_an_output_that_has_no_rows_is_not_divided():
    class Sum(Golden):
        def forward(self, x):
            return super().forward(x).sum()

    file = io.BytesIO()
    medpeft.save(medpeft.apply(Sum(), "lora", rank=2), file)
    bank = medpeft.Bank(Sum().eval())
    bank.add("a", file)
    assert bank(images(2), "a").shape == ()
    with pytest.raises(medpeft.MedpeftError, match="without a row for each"):
        bank(images(2), ["a", None])


@pytest.mark.parametrize("name", [["a"], {}, 5, b"a", None])
def test_a_name_that_is_no_text(bank, name):
    words = "No adapter .* is in the bank"
    for ask in (bank.metadata, bank.state, bank.remove):
        with pytest.raises(medpeft.MedpeftError, match=words):
            ask(name)
    if name is None:  # The base.
        return
    for ask in (bank.use, lambda name: bank(images(2), ["a", name])):
        with pytest.raises(medpeft.MedpeftError, match=words):
            ask(name)
    refused(bank, medpeft.MedpeftError, words, "b", bank.state("a"), like=name)
    assert bank.used is None


def test_names_in_any_sequence_or_none(bank):
    x = images(2)
    for names in (("a", None), np.array(["a", "a"]), iter(["a", "a"])):
        assert bank(x, names).shape == (2, 3)
    with pytest.raises(medpeft.MedpeftError, match="names=5 must be a name for each image"):
        bank(x, 5)


@pytest.mark.parametrize("metadata", [5, [1], {"classes": 3}, {"classes": [1, 2]}])
def test_metadata_that_a_file_could_not_have(bank, metadata):
    for source in (bank.state("a"), file_of(sites("lora", 1, rank=2))):
        refused(bank, medpeft.CheckpointError, "must be a dict", "b", source, like="a", metadata=metadata)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_bank_is_not_copied(bank, copied):
    with pytest.raises(medpeft.MedpeftError, match="of one model and cannot be copied or pickled"):
        copied(bank)


def another_layer(model):
    model.blocks[0].mlp.fc2 = nn.Identity()


def another_forward(model):
    model.blocks[0].mlp.forward = functools.partial(nn.Identity.forward, model.blocks[0].mlp)


def another_module(model):
    model.blocks.append(nn.Identity())


@pytest.mark.parametrize("used", [None, "a"])
@pytest.mark.parametrize("change", [another_layer, another_forward, another_module])
def test_modules_that_the_mirrors_do_not_have(bank, used, change):
    bank.use(used)
    bank(images(2), "a")
    change(bank._base.model)
    with pytest.raises(medpeft.MedpeftError, match="has other modules or another forward than when the bank"):
        bank(images(2), "a")
