"""A bank in a server: mixed requests, threads, and layers that do not get image by image."""

import random
import threading

import pytest
import torch
from banks import bank_of, file_of, images, several, sites
from every_method import perturb
from golden.model import Golden
from models import example, first, make
from torch import nn

import medpeft
from medpeft.serving import mixed, rows


def test_a_thousand_mixed_requests_equal_those_one_by_one():
    made, draw = several(), random.Random(0)
    bank, x = bank_of(made), images(8)
    right = {name: model(x).detach() for name, model in made.items()}
    right[None] = Golden().eval()(x).detach()
    for _ in range(125):
        numbers = [draw.randrange(8) for _ in range(8)]
        names = [draw.choice(list(right)) for _ in range(8)]
        expected = [right[name][number] for number, name in zip(numbers, names, strict=True)]
        found = bank(x[numbers], names)
        assert [row.shape for row in found] == [row.shape for row in expected]
        torch.testing.assert_close(torch.cat(list(found)), torch.cat(expected), rtol=1e-5, atol=1e-6)


def test_threads_ask_switch_add_and_remove_at_once():
    made = several()
    plain, x, errors = Golden().eval(), images(6), []
    bank = bank_of(made, plain)
    right = {name: model(x).detach() for name, model in made.items()}

    def ask(seed):
        draw = random.Random(seed)
        for _ in range(8):
            names = [draw.choice(list(right)) for _ in range(6)]
            for i, row in enumerate(bank(x, names)):
                torch.testing.assert_close(row, right[names[i]][i], rtol=1e-5, atol=1e-6)

    def run():
        for name in [*right, None] * 3:
            expected = Golden().eval()(x).detach() if name is None else right[name]
            assert torch.equal(bank(x, [name] * 6), expected)

    def switch_about():
        for name in [*made, None] * 2:
            bank.use(name)

    def add_and_remove():
        for i in range(5):
            bank.add(f"new {i}", medpeft.state(made["ssf 0"]), like="ssf 1")
            bank.remove(f"new {i}")

    def kept(job, *arguments):
        try:
            job(*arguments)
        except BaseException as error:
            errors.append(error)

    jobs = [(ask, 1), (ask, 2), (run,), (switch_about,), (add_and_remove,)]
    threads = [threading.Thread(target=kept, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert bank.prove().holds


def test_layers_run_once_for_all_adapters_also_within_windows(monkeypatch):
    shapes, by_image = [], rows._by_image
    monkeypatch.setattr(rows, "_by_image", lambda *a: shapes.append((a[2], len(a[3]))) or by_image(*a))
    model, x = medpeft.apply(make("swin"), "ssf", init="official"), example("swin")
    plain = make("swin")
    bank, outputs = medpeft.Bank(plain), {}
    for name in "abc":
        perturb(model)
        outputs[name] = first(model.eval()(x)).detach()
        bank.add(name, file_of(model))
    x, names = torch.cat([x, x])[:3], ["a", "b", "c"]
    output = bank(x, names)
    for i, name in enumerate(names):
        torch.testing.assert_close(output[i], outputs[name][i % len(example("swin"))], rtol=1e-9, atol=1e-10)
    assert {count for count, _ in shapes} == {1, 3}  # One image at first, to try it out.
    assert max(size for _, size in shapes) > 3


class SequenceFirst(nn.Module):
    """Its rows are tokens, not images, and it has as many as the batch has images."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x, mode="tokens first"):
        if mode == "images first":
            return self.head(self.mix(x).tanh().mean(1))
        tokens = self.mix(x.transpose(0, 1)).tanh()  # (B, 3, 4) → (3, B, 4)
        return self.head(tokens.mean(0))


def tokens_first():
    """A bank of such models, and the models by name."""
    made, bank = {}, medpeft.Bank(SequenceFirst().eval())
    for seed, name in enumerate("abc"):
        model = medpeft.apply(SequenceFirst(), "ssf", init="official", seed=seed, head="head").eval()
        made[name] = perturb(model)
        bank.add(name, file_of(model))
    return bank, made


def test_a_layer_whose_rows_are_no_images_runs_by_adapter(monkeypatch):
    monkeypatch.setattr(rows, "_by_image", lambda *a: pytest.fail("it would give rows to the wrong images"))
    (bank, made), x = tokens_first(), torch.randn(3, 3, 4)
    for i, row in enumerate(bank(x, list("abc"))):
        assert torch.equal(row, made["abc"[i]](x[i : i + 1])[0])


def test_whether_rows_are_images_is_tried_out_for_each_value_that_is_no_tensor():
    (bank, made), x = tokens_first(), torch.randn(3, 3, 4)
    for mode in ("images first", "tokens first"):
        for i, row in enumerate(bank(x, list("abc"), mode=mode)):
            torch.testing.assert_close(row, made["abc"[i]](x[i : i + 1], mode=mode)[0])
    tried = bank._entries["a"].kind.tried
    assert list(tried.values()) == [True, False]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("not enough memory")]
)
def test_a_lack_of_memory_is_no_verdict(monkeypatch, error):
    (bank, _), x = tokens_first(), torch.randn(3, 3, 4)

    def fail(*arguments):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(rows, "_by_image", fail)
        found = bank(x, list("abc"), mode="images first")
    assert bank._entries["a"].kind.tried == {}
    torch.testing.assert_close(found, bank(x, list("abc"), mode="images first"))
    assert list(bank._entries["a"].kind.tried.values()) == [True]


@pytest.mark.usefixtures("own_registry")
def test_an_adapter_that_vmap_cannot_run_goes_by_adapter():
    @medpeft.register("gain_of_large_outputs", by_image=True)
    class Gain(medpeft.Adapter):
        layers = (nn.Linear,)

        def __init__(self, site):
            super().__init__(site)
            self.gain = nn.Parameter(torch.ones(site.host.shape[0]))

        def forward(self, x, y):
            return y * self.gain if y.abs().max() > 0 else y

    made = {name: sites("gain_of_large_outputs", seed, target="blocks") for seed, name in enumerate("ab")}
    bank, x = bank_of(made), images(2)
    for row, i in zip(bank(x, ["a", "b"]), range(2), strict=True):
        assert torch.equal(row, made["ab"[i]](x[i : i + 1])[0])
    assert list(bank._entries["a"].kind.tried.values()) == [False]


def test_a_cpu_takes_a_large_batch_in_portions(monkeypatch):
    monkeypatch.setattr(mixed, "_AT_ONCE", 2)
    made = {name: sites("lora", seed, rank=2) for seed, name in enumerate("abc")}
    bank, x, names = bank_of(made), images(5), list("abcab")
    for row, i in zip(bank(x, names), range(5), strict=True):
        torch.testing.assert_close(row, made[names[i]](x[i : i + 1])[0].detach(), rtol=1e-5, atol=1e-6)
