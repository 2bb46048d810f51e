"""Files of kohya's scripts and LyCORIS: their own library computes the same, both ways."""

import contextlib
import logging

import pytest
import torch
from lora_files import close, refused
from models import example, make, output, randomise_adapters
from safetensors.torch import load_file, save_file

import medpeft
from medpeft.interchange import from_kohya, to_kohya

lycoris = pytest.importorskip("lycoris")

ALGORITHMS = {
    "lora": {"algo": "lora"},
    "lora of several ranks": {"conv_dim": 2, "conv_alpha": 5.0},
    "lora of rsLoRA with a scalar": {"rs_lora": True, "use_scalar": True},
    "lora with a core": {"use_tucker": True},
    "dora": {"dora_wd": True},
    "loha": {"algo": "loha"},
    "loha with cores": {"algo": "loha", "use_tucker": True},
    "loha with cores of another rank": {"algo": "loha", "use_tucker": True, "conv_dim": 2},
    "lokr": {"algo": "lokr"},
    "lokr by a factor": {"algo": "lokr", "factor": 2},
    "lokr by another factor": {"algo": "lokr", "factor": 12},
    "lokr unbalanced": {"algo": "lokr", "unbalanced_factorization": True},
    "lokr of two products": {"algo": "lokr", "decompose_both": True, "linear_dim": 1},
    "lokr of whole factors": {"algo": "lokr", "full_matrix": True},
    "lokr with a core": {"algo": "lokr", "use_tucker": True, "linear_dim": 1},
}
# LyCORIS 4.1.3 reads such files of its own as ones of another rank or factor, and fails.
NOT_READ_BY_LYCORIS = ("lokr with a core", "lokr by another factor", "lokr unbalanced")


@contextlib.contextmanager
def quiet():
    """LyCORIS logs every step."""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def trained_by_lycoris(base, path, **options):
    """A base with LyCORIS on it, and its file."""
    with quiet():
        network = lycoris.create_lycoris(base, 1.0, **{"linear_dim": 3, "linear_alpha": 2, **options})
        network.apply_to()
    randomised(network)
    network.save_weights(str(path), None, {})
    return base.eval()


def randomised(network):
    """Every tensor of a network of LyCORIS' drawn anew, in float64."""
    network.double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in network.children():
            for p in module.parameters():
                p.data = p.data.double() + 0.2 * torch.randn(p.shape, generator=generator).double()


def read_by_lycoris(base, path):
    with quiet():
        network, tensors = lycoris.create_lycoris_from_weights(1.0, str(path), base)
        network.apply_to()
    network.double().eval().load_state_dict(tensors, strict=False)
    return base.eval()


@pytest.mark.filterwarnings("ignore")  # LyCORIS'
@pytest.mark.parametrize(
    ("family", "case"),
    [("vit", case) for case in ALGORITHMS if "core" not in case]
    + [("monai_densenet", case) for case in ALGORITHMS if "scalar" not in case],
)
def test_files_of_lycoris_are_read_and_written_with_the_same_outputs(family, case, tmp_path):
    path, x = tmp_path / "a.safetensors", example(family)
    theirs = trained_by_lycoris(make(family), path, **ALGORITHMS[case])
    ours = from_kohya(make(family), path, prefix="lycoris").eval()
    assert close(output(ours, x), output(theirs, x))
    assert not close(output(ours, x), output(make(family).eval(), x))

    randomise_adapters(ours, size=0.3)
    to_kohya(ours, path, prefix="lycoris")
    assert close(output(from_kohya(make(family), path, prefix="lycoris").eval(), x), output(ours, x))
    if case not in NOT_READ_BY_LYCORIS:
        assert close(output(read_by_lycoris(make(family), path), x), output(ours, x))


@pytest.mark.filterwarnings("ignore")  # LyCORIS'
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"algo": "full"}, "whole differences of weights. Merge it into the weights with the library"),
        ({"algo": "ia3"}, "part of (IA)³"),
        ({"algo": "glora"}, "part of GLoRA"),
        ({"dora_wd": True, "wd_on_output": False}, "DoRA of the norms of input channels"),
        ({"algo": "loha", "dora_wd": True}, "'dora_scale', which medpeft's 'loha' has not. Merge it"),
    ],
)
def test_other_algorithms_of_lycoris_are_named_with_the_way_round(options, reason, tmp_path):
    path = tmp_path / "a.safetensors"
    trained_by_lycoris(make("vit"), path, **options)
    refused(from_kohya, make("vit"), path, reason, prefix="lycoris")


@pytest.mark.filterwarnings("ignore")  # LyCORIS'
@pytest.mark.parametrize("algorithm", ["lora", "lokr"])
def test_kohyas_network_of_a_unet_is_read_with_the_same_outputs(algorithm, tmp_path):
    from lycoris.kohya import create_network

    path, x = tmp_path / "a.safetensors", example("diffusion_unet")
    theirs = make("diffusion_unet").eval()
    with quiet():
        network = create_network(
            1.0, 2, 3.0, None, [], theirs.unet, algo=algorithm, conv_dim=1, conv_alpha=2.0, preset="attn-mlp"
        )
        network.apply_to([], theirs.unet, False, True)
    randomised(network)
    network.save_weights(str(path), None, {})
    assert next(iter(load_file(path))).startswith("lora_unet_")
    ours = make("diffusion_unet").eval()
    from_kohya(ours.unet, path)
    assert close(output(ours, x), output(theirs, x))
    assert not close(output(ours, x), output(make("diffusion_unet").eval(), x))


@pytest.mark.filterwarnings("ignore")  # LyCORIS'
def test_layers_by_different_methods_share_a_file(tmp_path):
    methods = {"lora": {"target": "*.qkv"}, "loha": {"target": "*.fc1"}, "lokr": {"target": "*.proj"}}
    model = randomise_adapters(medpeft.apply(make("vit"), methods, head=None), size=0.3).eval()
    path, x = tmp_path / "a.safetensors", example("vit")
    to_kohya(model, path, prefix="lycoris")
    back = from_kohya(make("vit"), path, prefix="lycoris").eval()
    assert close(output(back, x), output(model, x))
    assert close(output(read_by_lycoris(make("vit"), path), x), output(model, x))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", {"rank": 2, "target": "*.fc1", "dora": {"blocks.0": True}}),
        ("loha", {"rank": {"blocks.0": 3, "*": 2}}),
        (
            "lokr",
            {"rank": {"*.qkv": 1, "*": 10_000}, "factor": {"*.qkv": 4, "*": 2}, "both": {"*.qkv": True}},
        ),
    ],
)
def test_options_by_place_come_back(method, options, tmp_path):
    model = medpeft.apply(make("vit"), method, head=None, **options)
    path, x = tmp_path / "a.safetensors", example("vit")
    to_kohya(randomise_adapters(model, size=0.3), path, prefix="lycoris")
    back = from_kohya(make("vit"), path, prefix="lycoris")
    assert close(output(back, x), output(model, x))
    assert medpeft.report(back).trainable == medpeft.report(model).trainable


@pytest.mark.parametrize(
    ("family", "method", "options", "reason"),
    [
        ("vit", "lora", {}, "the head head: apply with head=None"),
        (
            "vit",
            "lora+bias",
            {"head": None},
            "the methods lora+bias: these files hold lora, loha, lokr alone",
        ),
        ("vit", "lora", {"head": None, "bias": True}, "LoRA with a bias of its own has no place in files of"),
        ("multihead_attention", "loha", {"head": None}, "so that LyCORIS's wrapper would not act"),
    ],
)
def test_what_these_files_cannot_hold_is_named(family, method, options, reason, tmp_path):
    model = medpeft.apply(make(family), method, **options)
    with pytest.raises(medpeft.CheckpointError) as caught:
        to_kohya(model, tmp_path / "a.safetensors")
    assert reason in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_damaged_tensors_are_refused_and_leave_the_model(tmp_path):
    path = tmp_path / "a.safetensors"
    methods = {
        "lora": {"target": "blocks.0.attn.qkv"},
        "loha": {"target": "blocks.0.mlp.fc1"},
        "lokr": {"target": "blocks.0.attn.proj"},
    }
    to_kohya(medpeft.apply(make("vit"), methods, head=None), path, prefix="lycoris")
    whole = load_file(path)
    for key, tensor in whole.items():
        others = {name: t for name, t in whole.items() if name != key}
        spoiled = [tensor[None].expand(2, *tensor.shape), tensor[None][:0]]
        if not key.endswith("alpha"):
            spoiled += [None, tensor.long(), tensor.flatten()]
        for other in spoiled:
            if other is not None:
                others[key] = other.contiguous()
            save_file(others, path)
            refused(from_kohya, make("vit"), path, str(path), prefix="lycoris")
        save_file(whole | {key: torch.full_like(tensor, float("nan"))}, path)
        refused(from_kohya, make("vit"), path, "not finite", prefix="lycoris")


@pytest.mark.parametrize(
    ("method", "part", "shape"),
    [("lora", "dora_scale", ()), ("loha", "hada_w1_a", (2, 2, 2)), ("lokr", "lokr_w2_a", (1, 2, 2))],
)
def test_tensors_of_other_axes_are_refused(method, part, shape, tmp_path):
    options = {"lora": {"dora": True}, "loha": {"tucker": True}, "lokr": {"tucker": True, "factor": 2}}[
        method
    ]
    path = tmp_path / "a.safetensors"
    model = medpeft.apply(make("monai_densenet"), method, target="*.conv2", head=None, rank=1, **options)
    to_kohya(model, path, prefix="lycoris")
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith(part))
    save_file(tensors | {key: torch.ones(shape)}, path)
    refused(from_kohya, make("monai_densenet"), path, str(path), prefix="lycoris")
