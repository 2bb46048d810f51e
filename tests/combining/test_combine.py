"""Several files made one adapter: what is added in the weights, what is averaged, what is refused."""

import copy
import io
import warnings

import pytest
import torch
from combined import changes, require_sum, trained
from every_method import perturb
from models import example, make
from torch import nn

import medpeft
from medpeft.interchange import to_peft

LORA = {
    "fused, other ranks and factors": ("vit", {"rank": 2}, {"rank": 3, "alpha": 5, "rslora": True}),
    "from singular vectors": ("vit", {"rank": 2, "init": "pissa"}, {"rank": 2, "freeze_a": True}),
    "by place": ("vit", {"rank": {"blocks.0": 1}}, {"rank": {"*.1.*": 4, "*": 2}, "alpha": {"blocks.0": 3}}),
    "read by a parent": ("multihead_attention", {"rank": 2}, {"rank": 1}),
    "convolutions": ("resnet", {"rank": 2, "target": "conv"}, {"rank": 1, "target": "conv"}),
}


@pytest.mark.parametrize("case", LORA)
def test_lora_adds_in_the_weights_exactly(case):
    family, first, second = LORA[case]
    base = make(family).double()
    (one, a), (two, b) = (
        trained(base, "lora", i, seed=i, head=None, **o) for i, o in enumerate((first, second))
    )
    model = copy.deepcopy(base)
    report = medpeft.combine(model, {one: 0.7, two: -0.4})
    assert report.error == 0
    assert [weight for _, weight in report.files] == [0.7, -0.4]
    require_sum(model, base, [a, b], [0.7, -0.4])
    file = io.BytesIO()
    medpeft.save(model, file)
    again = medpeft.load(copy.deepcopy(base), file.getvalue()).eval()
    assert torch.equal(again(example(family)), model.eval()(example(family)))


def test_a_smaller_rank_is_the_nearest_and_says_what_it_leaves_out():
    base = make("vit").double()
    (one, a), (two, b) = (trained(base, "lora", i, head=None, rank=3, target="blocks.*") for i in (1, 2))
    model = copy.deepcopy(base)
    report = medpeft.combine(model, {one: 0.7, two: 0.3}, rank=4)
    assert report.rank == 4
    assert "rank 4, which leaves out" in str(report)
    lost = whole = 0.0
    for name, change in changes(model, base).items():
        if not name.endswith("weight"):
            continue
        exact = 0.7 * changes(a, base)[name] + 0.3 * changes(b, base)[name]
        lost, whole = lost + (exact - change).square().sum(), whole + exact.square().sum()
        if name.endswith("fc1.weight"):
            left = torch.linalg.svdvals(exact)[4:].square().sum()
            assert torch.allclose((exact - change).square().sum(), left, rtol=1e-9)
    assert report.error == pytest.approx(float((lost / whole).sqrt()), rel=1e-9)
    assert 0 < report.error < 1


@pytest.mark.parametrize(("how", "theirs"), [("sum", "svd"), ("ties", "ties_svd")])
def test_peft_combines_to_the_same_weights(how, theirs, tmp_path):
    import peft

    base = make("hf_vit").double()
    files, directories = [], []
    for number in (1, 2, 3):
        file, model = trained(base, "lora", number, head=None, rank=2, target="*.fc1")
        files.append(file)
        directories.append(tmp_path / str(number))
        directories[-1].mkdir()
        to_peft(model, directories[-1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = peft.PeftModel.from_pretrained(copy.deepcopy(base), directories[0], adapter_name="0")
        for number, directory in enumerate(directories[1:], 1):
            other.load_adapter(directory, adapter_name=str(number))
        options = {"density": 0.5} if how == "ties" else {}
        other.add_weighted_adapter(
            ["0", "1", "2"], [0.5, 0.3, 0.2], "all", combination_type=theirs, svd_rank=3, **options
        )
        other.set_adapter("all")
    ours = copy.deepcopy(base)
    medpeft.combine(ours, dict(zip(files, (0.5, 0.3, 0.2), strict=True)), how=how, rank=3, density=0.5)
    x = example("hf_vit").double()
    assert torch.allclose(ours.eval()(x)[0], other.eval()(x)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["ties", "dare"])
def test_every_change_in_the_weights_is_trimmed_or_dropped(how):
    from medpeft.combining.changes import Recipe

    base = make("vit").double()
    (one, a), (two, b) = (trained(base, "lora+bias", i, head=None, rank=2, target="*.fc1") for i in (1, 2))
    model = copy.deepcopy(base)
    report = medpeft.combine(model, {one: 1.0, two: 0.5}, how=how, density=0.4, seed=7, rank=16)
    recipe = Recipe(how, (1.0, 0.5), 0.4, 7)
    first, second, found = changes(a, base), changes(b, base), changes(model, base)
    for name, tensor in (
        ("blocks.1.mlp.fc1.weight", "blocks.1.mlp.fc1.adapters.lora.0"),
        ("blocks.0.mlp.fc1.bias", "blocks.0.mlp.fc1.bias"),
    ):
        expected = recipe.combine(tensor, [first[name], second[name]])
        assert torch.allclose(found[name], expected, rtol=1e-9, atol=1e-12)
    assert report.error < 1e-9  # The rank is that of the whole layer.


@pytest.mark.parametrize("method", ["bias", "ssf", "ia3", "shira", "norm+ssf"])
def test_what_is_linear_in_its_parameters_adds_in_the_weights(method):
    base = make("vit").double()
    (one, a), (two, b) = (trained(base, method, i, head=None) for i in (1, 2))
    model = copy.deepcopy(base)
    report = medpeft.combine(model, {one: 0.5, two: 0.25})
    assert report.rank is None
    if "+" not in method:
        require_sum(model, base, [a, b], [0.5, 0.25])
    else:
        gamma = [m.norm.adapters["ssf"].scale for m in (model, a, b)]
        assert torch.allclose(gamma[0], 1 + 0.5 * (gamma[1] - 1) + 0.25 * (gamma[2] - 1))


def test_other_adapters_are_averaged_if_they_started_from_the_same_values():
    base = make("vit").double()
    (one, a), (two, b) = (trained(base, "houlsby", i, bottleneck=4) for i in (1, 2))
    model = copy.deepcopy(base)
    medpeft.combine(model, {one: 0.5, two: 0.5})
    down = [m.blocks[0].attn.adapters["houlsby"].bottleneck.down for m in (model, a, b)]
    assert torch.allclose(down[0], (down[1] + down[2]) / 2)
    other, _ = trained(base, "houlsby", 2, seed=5, bottleneck=4)
    refused(base, {one: 0.5, other: 0.5}, r"started from other values .*seed 5.* from one seed")
    (one, _), (two, _) = (trained(base, "shira", i, seed=i, head=None) for i in (1, 2))
    refused(base, {one: 0.5, two: 0.5}, "which does not train, is another")


def refused(base, files, message, **options):
    """The call ends by the message, and the model is as before."""
    model = copy.deepcopy(base)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(medpeft.MedpeftError, match=message):
        medpeft.combine(model, files, **options)
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_heads_are_averaged_if_their_classes_agree_or_one_is_taken():
    base = make("vit")
    one, a = trained(base, "lora", 1, classes=["a", "b", "c"])
    two, b = trained(base, "lora", 2, classes=["a", "b", "c"])
    three, c = trained(base, "lora", 3, classes=["a", "c", "b"])
    model = copy.deepcopy(base)
    assert medpeft.combine(model, {one: 3.0, two: 1.0}).classes == ["a", "b", "c"]
    assert torch.allclose(model.head.weight, 0.75 * a.head.weight + 0.25 * b.head.weight)
    refused(base, {one: 0.5, three: 0.5}, "names of the classes: pass head=")
    refused(base, {one: 1.0, two: -1.0}, r"'head\..*' can only be averaged")
    model = copy.deepcopy(base)
    assert medpeft.combine(model, {one: 1.0, three: -1.0}, head=three).classes == ["a", "c", "b"]
    assert torch.equal(model.head.weight, c.head.weight)


def test_a_head_of_another_size_is_left_out():
    base = make("vit")
    one, _ = trained(base, "ssf", 1)
    wide = copy.deepcopy(base)
    wide.head = nn.Linear(16, 9)
    two, _ = trained(wide, "ssf", 2)
    refused(base, {one: 0.5, two: 0.5}, "num_classes=9")
    model = copy.deepcopy(base)
    medpeft.combine(model, {one: 0.5, two: 0.5}, head=one)
    assert model.head.weight.shape == (3, 16)


def test_statistics_that_adapt_are_averaged():
    base = make("resnet")
    files, models = [], []
    for number in (1, 2):
        model = perturb(medpeft.apply(copy.deepcopy(base), "bn", batchnorm="adapt")).train()
        for _ in range(number):
            model(example("resnet") * number)
        file = io.BytesIO()
        medpeft.save(model, file)
        files.append(file.getvalue())
        models.append(model)
    model = copy.deepcopy(base)
    medpeft.combine(model, dict.fromkeys(files, 1.0))
    assert torch.allclose(model.bn1.running_var, sum(m.bn1.running_var for m in models) / 2)
    assert model.bn1.num_batches_tracked == 2
    refused(base, dict(zip(files, (2.0, -1.0), strict=True)), "can only be averaged")


def test_what_cannot_be_combined_is_refused_in_words():
    base, other = make("vit"), perturb(make("vit"))
    lora, _ = trained(base, "lora", 1)
    for second, message in (
        (trained(base, "ssf", 2)[0], "cannot be combined with"),
        (trained(base, "lora", 2, parts="qkv")[0], "lora: parts: 'qkv' in this file, 'qv' in the first"),
        (trained(base, "lora", 2, target="mlp")[0], "only in this file"),
        (trained(base, "lora", 2, dora=True)[0], "dora"),
        (trained(other, "lora", 2)[0], "was trained on another base"),
        (trained(base, "lora", 2)[0][:-9], "cut off"),
    ):
        refused(base, {lora: 0.5, second: 0.5}, message)
    refused(
        base,
        {trained(base, "lora", 1, dora=True)[0]: 1.0},
        "dora=True, and the sum of such changes is no LoRA",
    )
    refused(base, {lora: 1.0}, "pass rank=", how="ties")
    refused(base, {lora: 1.0}, "how='linear' is not known: choose one of 'sum', 'ties', 'dare'", how="linear")
    refused(base, {lora: float("nan")}, "must be a finite number")
    refused(base, {lora: 1.0}, "density=0 must be", density=0)
    refused(base, {lora: 1.0}, "is none of the files", head="a.safetensors")
    refused(base, {}, "must be a dict of weights")
    refused(base, [lora], "must be a dict of weights")
    adapted = medpeft.load(copy.deepcopy(base), lora)
    with pytest.raises(medpeft.MedpeftError, match="this model is adapted"):
        medpeft.combine(adapted, {lora: 1.0})
