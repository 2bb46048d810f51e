"""A bank computes with each adapter what a model with this one alone computes, and leaves the rest alone."""

import copy
import re
from types import MethodType

import pytest
import torch
from banks import bank_of, file_of, images, sites
from checkpoints import bits, same, trained
from every_method import CASES, adapted, base, perturb
from golden.model import Golden
from models import first
from places import ROOT
from torch import nn

import medpeft
from medpeft.adapters import registry


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_every_method_alone_in_use_and_mixed(case):
    model, x = adapted(case)
    outputs, files = [], []
    for _ in range(2):
        outputs.append(first(model(x)).clone())
        files.append(file_of(model))
        perturb(model)
    plain = base(case)
    unadapted = first(plain(x)).clone()
    keys, bank = list(plain.state_dict()), medpeft.Bank(plain)
    for name, file in zip("ab", files, strict=True):
        bank.add(name, file)
    names = list("ab" * len(x))[: len(x)]
    right = torch.stack([outputs["ab".index(name)][i] for i, name in enumerate(names)])
    for used in ("a", "b", None):
        bank.use(used)
        expected = unadapted if used is None else outputs["ab".index(used)]
        assert torch.equal(first(plain(x)), expected)
        for name, output in zip("ab", outputs, strict=True):
            assert torch.equal(first(bank(x, name)), output)
        assert torch.equal(first(bank(x, None)), unadapted)
        torch.testing.assert_close(first(bank(x, names)), right, rtol=1e-10, atol=1e-11)
    assert list(plain.state_dict()) == keys
    assert bank.prove().holds


def test_adapters_of_different_methods_heads_and_the_base_in_one_batch():
    made = {
        "three": sites("lora", 1, rank=2),
        "five": sites("lora", 2, classes=5, rank=2),
        "shifted": sites("ssf", 3),
        "biased": sites("bias", 4, classes=5),
    }
    bank, x = bank_of(made), images(6)
    names = ["five", "three", None, "biased", "shifted", "five"]
    rows = bank(x, names)
    assert isinstance(rows, list)
    assert [tuple(row.shape) for row in rows] == [(5,), (3,), (3,), (5,), (3,), (5,)]
    for i, name in enumerate(names):
        alone = Golden().eval() if name is None else made[name]
        torch.testing.assert_close(rows[i], alone(x[i : i + 1])[0].detach(), rtol=1e-5, atol=1e-6)
    agreeing = bank(x[:2], names=["five", "biased"])
    assert agreeing.shape == (2, 5)


@torch.no_grad()
def test_a_head_of_another_size_comes_and_goes_bit_for_bit():
    made = {"three": sites("bias", 1), "five": sites("bias", 2, classes=5)}
    plain, x = Golden().eval(), images(2)
    bank = bank_of(made, plain)
    before, head = bits(plain), plain.head.weight
    for name in ("five", "three", "five", None, "three", None):
        bank.use(name)
        assert torch.equal(plain(x), (made[name] if name else Golden().eval())(x))
        assert bank.used == name
        if name is not None:
            assert plain.head.weight.requires_grad
            assert medpeft.state(plain).keys() == bank.state(name).keys()
    assert plain.head.weight is head
    assert same(before, bits(plain))


def test_adapters_of_one_kind_are_written_into_the_same_tensors():
    made = {"a": sites("lora", 1, rank=2), "b": sites("lora", 2, rank=2)}
    plain = Golden().eval()
    bank = bank_of(made, plain)
    bank.use("a")
    before = list(plain.parameters())
    calls = []

    def backend(graph, example):
        calls.append(graph)
        return graph.forward

    compiled, x = torch.compile(plain, backend=backend), images(2)
    with torch.no_grad():
        for name in ("a", "b", "a", "b"):
            bank.use(name)
            torch.testing.assert_close(compiled(x), made[name](x))
    assert len(calls) == 1
    assert all(one is other for one, other in zip(before, plain.parameters(), strict=True))


def doubled(self, x):
    """Twice what the class's forward computes."""
    return 2 * type(self).forward(self, x)


@pytest.mark.parametrize("options", [{"method": "ssf"}, {"method": "lora", "dora": True}])
@torch.no_grad()
def test_a_forward_that_was_put_on_the_model_or_on_an_adapted_layer_is_run(options):
    base = Golden().eval()
    for module in (base, base.blocks[0].mlp.fc1):
        module.forward = MethodType(doubled, module)
    made = {}
    for seed, name in enumerate("ab"):
        made[name] = trained(copy.deepcopy(base), seed=seed, **options)
    bank, x = bank_of(made, base), images(2)
    mixed = bank(x, list("ab"))
    for i, name in enumerate("ab"):
        bank.use(name)
        assert torch.equal(bank(x, name), base(x))
        assert torch.equal(base(x), made[name](x))
        torch.testing.assert_close(mixed[i], base(x)[i])


def test_a_model_in_use_trains_saves_and_is_not_overwritten():
    made = {"a": sites("lora", 1, rank=2), "b": sites("lora", 2, rank=2)}
    plain = Golden().eval()
    bank = bank_of(made, plain)
    bank.use("a")
    with torch.no_grad():
        plain.head.weight.add_(1.0)
    with pytest.raises(medpeft.MedpeftError, match="was trained since use"):
        bank.use("b")
    bank.add("b2", file_of(made["b"]))
    assert bank.used == "a"
    bank.add("a2")
    assert bank.used == "a2"
    file = file_of(plain)
    bank.use("b")
    bank.use("a2")
    assert file_of(plain).getvalue() == file.getvalue()
    assert not torch.equal(bank.state("a")["head.weight"], bank.state("a2")["head.weight"])


def test_states_of_an_adapter_in_use_or_of_one_in_the_bank():
    made = {"a": sites("lora", 1, rank=2), "b": sites("lora", 2, classes=4, rank=2)}
    bank, x = bank_of({"a": made["a"]}), images(2)
    bank.add("b", medpeft.state(made["b"], numpy=True), like="a", metadata={"classes": list("wxyz")})
    assert bank.metadata("b") == {"classes": ["w", "x", "y", "z"]}
    assert torch.equal(bank(x, "b"), made["b"](x).detach())
    bank.use("b")
    bank.add("c", medpeft.state(made["a"]))
    assert torch.equal(bank(x, "c"), made["a"](x).detach())


def test_a_bank_of_a_model_that_is_adapted_and_trained_has_the_base_below_it():
    model, x = sites("bias", 1), images(2)
    trained = model(x).detach()
    bank = medpeft.Bank(model)
    assert torch.equal(bank(x, None), Golden().eval()(x).detach())
    with pytest.raises(medpeft.MedpeftError, match="whose values are not in the bank"):
        bank.use(None)
    bank.add("mine")
    bank.use(None)
    assert torch.equal(model(x), Golden().eval()(x))
    assert torch.equal(bank(x, "mine"), trained)
    given_up = sites("bias", 1, keep_base=False)
    with pytest.raises(medpeft.MedpeftError, match="gave up the base's values"):
        medpeft.Bank(given_up)


def test_one_removed_leaves_every_bit_of_the_others_and_the_proof_says_so():
    made = {name: sites("ssf", seed) for seed, name in enumerate(["north", "south", "west"])}
    plain, x = Golden().eval(), images(3)
    bank = bank_of(made, plain)
    names = ["south", "west", "south"]
    before, digests = bank(x, names), {fact.name: fact.now for fact in bank.prove().adapters}
    bank.use("north")
    with pytest.raises(medpeft.MedpeftError, match="The model uses 'north'"):
        bank.remove("north")
    bank.use(None)
    bank.remove("north")
    proof = bank.prove()
    assert proof.holds
    assert {fact.name: fact.now for fact in proof.adapters} == {n: digests[n] for n in ("south", "west")}
    assert [(fact.name, fact.before, fact.now) for fact in proof.removed] == [("north", digests["north"], "")]
    assert torch.equal(bank(x, names), before)
    assert "north" not in bank
    assert bank.names == tuple(bank) == ("south", "west")
    assert len(bank) == 2
    with pytest.raises(medpeft.MedpeftError, match=r"No adapter 'nort' is in the bank"):
        bank(x, "nort")
    assert digests["south"] == medpeft.inspect(file_of(made["south"])).document["content"]


def test_values_of_a_removed_adapter_do_not_stay_in_the_tensors_of_its_kind():
    bank = bank_of({"a": sites("lora", 1, rank=2), "b": sites("lora", 2, rank=2)})
    bank.use("a")
    tensors = [item.adapter.up for item in bank._entries["b"].kind.built]
    bank.use(None)
    assert not any(tensor.any() for tensor in tensors)


def of_seeds(method, seeds):
    """Models that were adapted with a seed each, by name."""
    made = {}
    for name, seed in seeds.items():
        made[name] = medpeft.apply(Golden(), method, target="blocks", seed=seed).eval()
    return made


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize("kept", ["buffer", "attribute"])
def test_what_is_drawn_and_not_saved_is_that_of_each_seed(kept):
    @medpeft.register(f"drawn_{kept}")
    class Drawn(medpeft.Adapter):
        layers = (nn.Linear,)

        def __init__(self, site):
            super().__init__(site)
            self.gain = nn.Parameter(torch.ones(site.host.shape[0]))
            drawn = torch.rand(site.host.shape[0], generator=site.generator)
            if kept == "buffer":
                self.register_buffer("drawn", drawn, persistent=False)
            else:
                self.drawn = drawn

        def forward(self, x, y):
            return y + self.gain * self.drawn

    made = of_seeds(f"drawn_{kept}", {"a": 1, "b": 2, "c": 1, "d": 3})
    bank, x = bank_of(made), images(4)
    for row, (name, model) in zip(bank(x, list("abcd")), made.items(), strict=True):
        number = "abcd".index(name)
        torch.testing.assert_close(row, model(x[number : number + 1])[0].detach())
    assert len(bank._entries.kinds()) == 3


def test_svdiff_of_other_seeds_is_one_kind():
    bank = bank_of(of_seeds("svdiff", {"a": 1, "b": 2, "c": 3}))
    assert len(bank._entries.kinds()) == 1


def test_the_proof_finds_what_was_written_to():
    bank = bank_of({"a": sites("ssf", 1)})
    with torch.no_grad():
        bank._entries["a"].values["head.bias"].add_(1)
    proof = bank.prove()
    assert not proof.holds
    assert "CHANGED" in str(proof)
    assert proof.to_dict()["holds"] is False


def test_a_bank_shows_its_adapters():
    bank = bank_of({"a": sites("ssf", 1), "b": sites("lora", 2, rank=2)})
    shown = repr(bank)
    assert "Bank of 2 adapters on Golden, using None" in shown
    assert f"{medpeft.inspect(file_of(sites('ssf', 1))).parameters:,}" in shown


def test_the_page_names_the_methods_whose_images_are_computed_together():
    page = (ROOT / "docs/bank.md").read_text(encoding="utf-8")
    row = re.search(r"^\| (.*?) \| together:", page, flags=re.MULTILINE).group(1)
    additive, selective = [set(re.findall(r"`(\w+)`", half)) for half in row.split(";")]
    by_image = {
        n for n, m in registry._METHODS.items() if m.by_image and m.define.__module__.startswith("medpeft.")
    }
    assert additive == by_image
    for name in selective:
        assert registry.find(name).adapter is None


def test_what_others_apply_after_use_is_taken_note_of():
    plain, x = Golden().eval(), images(2)
    expected = plain(x)
    bank = bank_of({"a": sites("lora", 1, rank=2)}, plain)
    bank.use("a")
    medpeft.remove(plain)
    medpeft.apply(plain, "bias")
    with torch.no_grad():
        perturb(plain)
    bank.add("mine")
    assert torch.equal(bank(x, None), expected)
    assert torch.equal(bank(x, "mine"), plain(x))
    bank.use("a")
    bank.use(None)
    assert torch.equal(plain(x), expected)
    assert bank.prove().holds
