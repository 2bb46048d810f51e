"""`prefix` finds the last place before what trains, and its rest trains the model as the model itself would."""

import copy
import pickle
import threading
from types import MethodType

import pytest
import torch
from models import example, make, output, randomise, randomise_adapters
from prefixes import PLACES, adapted, gradients, logits, without_drops
from torch import nn
from torch.utils.checkpoint import checkpoint

import medpeft


@pytest.mark.parametrize("name", PLACES)
def test_the_rest_gives_the_model_s_bits_and_gradients_for_any_number_of_images(name):
    model, x = adapted(name), example(name, torch.float32)
    split = medpeft.prefix(model, x)
    assert split.place == f"the input of {PLACES[name][1]!r}"
    more = torch.cat([x, x.flip(0), x[:1]])
    for mode in (True, False):
        split.rest.train(mode)
        features = split.features(more)
        assert features.shape == (5, *split.shape)
        assert not features.requires_grad
        direct = logits(model(more))
        direct.square().sum().backward()
        expected = gradients(model)
        rest = logits(split.rest(features))
        assert torch.equal(rest, direct)
        rest.square().sum().backward()
        found = gradients(model)
        assert found.keys() == expected.keys()
        for key, gradient in found.items():
            torch.testing.assert_close(gradient, expected[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "method", ["ssf", "bias+norm", "adaptformer", "svdiff", "bitfit", "fact", "convpass"]
)
def test_every_method_on_the_last_block_goes_on_from_it(method):
    target = "blocks.1" if method in ("adaptformer", "convpass") else "blocks.1.*"
    model, x = adapted("vit", method, target=target), example("vit", torch.float32)
    split = medpeft.prefix(model, x)
    assert split.place == "the input of 'blocks.1'"
    assert torch.equal(split.rest(split.features(x)), model(x))


def test_features_of_a_linear_probe_are_what_enters_the_head():
    x = example("resnet", torch.float32)
    model = medpeft.apply(make("resnet", torch.float32), "linear_probe")
    split = medpeft.prefix(model, x)
    assert split.place == "the input of 'fc'"
    assert torch.equal(split.features(x), model.forward_head(model.forward_features(x), pre_logits=True))


def test_two_heads_share_the_last_place_before_both():
    model = medpeft.apply(make("deit_distilled", torch.float32), "linear_probe")
    assert medpeft.prefix(model, example("deit_distilled", torch.float32)).place == "the output of 'norm'"


def test_dropout_before_the_head_comes_after_the_place():
    layers = [nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2)]
    model = medpeft.apply(nn.Sequential(*layers), "linear_probe", head="3")
    x = torch.randn(6, 4)
    split = medpeft.prefix(model, x)
    assert split.place == "the input of '2'"
    split.rest.train()
    features = split.features(x)
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    assert torch.equal(split.rest(features), expected)


def test_what_trained_in_the_rest_has_trained_in_the_model(tmp_path):
    x = example("vit", torch.float32)
    direct, model = adapted("vit"), adapted("vit")
    split = medpeft.prefix(model, x)
    features = split.features(x)
    for net, inputs in ((direct, x), (split.rest, features)):
        net.train()
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            net(inputs).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, ours), theirs in zip(model.named_parameters(), direct.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=name)
    medpeft.save(model, tmp_path / "rest.safetensors")
    loaded = medpeft.load(without_drops(make("vit", torch.float32)), tmp_path / "rest.safetensors")
    assert torch.equal(loaded(x), split.rest(features))


def test_what_becomes_of_the_model_becomes_of_its_rest():
    x = example("vit", torch.float32)
    model = adapted("vit", target="blocks.1.*").eval()
    split = medpeft.prefix(model, x)
    features = split.features(x)
    with medpeft.disabled(model):
        assert torch.equal(split.rest(features), model(x))
        base = model(x)
    assert not torch.allclose(model(x), base)
    before = model(x)
    medpeft.merge(model)
    torch.testing.assert_close(split.rest(features), before, rtol=1e-4, atol=1e-5)
    assert torch.equal(split.rest(features), model(x))


def test_the_rest_may_be_copied_and_pickled_with_its_model():
    x = example("resnet", torch.float32)
    model = adapted("resnet").eval()
    split = medpeft.prefix(model, x)
    features = split.features(x)
    for other in (copy.deepcopy(split.rest), pickle.loads(pickle.dumps(split.rest))):
        assert torch.equal(other(features), model(x))
        next(p for p in other.parameters() if p.requires_grad).data.add_(1.0)
        assert not torch.equal(other(features), model(x))


def test_nothing_is_left_on_the_model_and_threads_do_not_meet():
    x = example("vit", torch.float32)
    model = adapted("vit").eval()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    split = medpeft.prefix(model, x)
    expected, features = model(x), split.features(x)
    wrong = []

    def work(run, inputs):
        wrong.extend(run for _ in range(10) if not torch.equal(run(inputs), expected))

    threads = [threading.Thread(target=work, args=(model, x)) for _ in range(2)]
    threads += [threading.Thread(target=work, args=(split.rest, features)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    with pytest.raises(medpeft.MedpeftError, match="do not fit: the model goes on from \\(17, 16\\)"):
        split.rest(features[:, :3])
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


def test_activation_checkpointing_recomputes_from_the_features():
    x = example("vit", torch.float32)
    model = adapted("vit").train()
    split = medpeft.prefix(model, x)
    features = split.features(x)
    model(x).square().sum().backward()
    expected = gradients(model)
    model.set_grad_checkpointing(True)
    split.rest(features).square().sum().backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)


def test_features_of_another_dtype_are_converted():
    x = example("vit", torch.float32)
    model = adapted("vit").eval()
    split = medpeft.prefix(model, x)
    half = split.features(x).half()
    torch.testing.assert_close(split.rest(half), model(x), rtol=0.01, atol=0.01)
    assert torch.equal(split.rest(half), split.rest(half.float()))


def test_the_features_are_not_written_into():
    model = randomise(nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5, inplace=True), nn.Linear(8, 2))).train()
    medpeft.apply(model, "linear_probe", head="2")
    split = medpeft.prefix(model, torch.randn(3, 4))
    features = split.features(torch.randn(3, 4))
    before = features.clone()
    split.rest(features)
    assert torch.equal(features, before)


def test_a_model_with_nothing_before_is_refused_and_stays_as_it_is():
    model = medpeft.apply(randomise(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))), "full", head="1").eval()
    with pytest.raises(medpeft.MedpeftError, match="no frozen layer before '0', which trains"):
        medpeft.prefix(model, torch.randn(3, 4))
    assert not any(module.training for module in model.modules())
    with pytest.raises(medpeft.MedpeftError, match="no trainable tensor that meets its input"):
        medpeft.prefix(model.requires_grad_(False), torch.randn(3, 4))
    with pytest.raises(medpeft.MedpeftError, match="no values"):
        medpeft.prefix(copy.deepcopy(model).to("meta"), torch.randn(3, 4))


def test_finding_leaves_the_model_and_the_random_state_alone():
    model, x = adapted("resnet").eval(), example("resnet", torch.float32)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    drawn = torch.get_rng_state()
    medpeft.prefix(model, x)
    assert torch.equal(drawn, torch.get_rng_state())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert "output of" not in medpeft.prefix(model, x).place


def test_a_switch_of_the_adapters_waits_for_a_forward_of_the_rest():
    x = example("vit", torch.float32)
    model = adapted("vit").eval()
    split = medpeft.prefix(model, x)
    features, expected, inside, go_on = split.features(x), model(x), threading.Event(), threading.Event()

    def pause(module, args):
        inside.set()
        go_on.wait(5)

    handle = model.blocks[1].mlp.register_forward_pre_hook(pause)
    results = []
    forward = threading.Thread(target=lambda: results.append(split.rest(features)))
    forward.start()
    assert inside.wait(5)
    switch = threading.Thread(target=lambda: medpeft.remove(model))
    switch.start()
    switch.join(0.2)
    assert switch.is_alive()  # It waits for the forward.
    go_on.set()
    forward.join()
    switch.join()
    handle.remove()
    assert torch.equal(results[0], expected)


def doubled(self, x):
    """Twice what the class's forward computes."""
    return 2 * type(self).forward(self, x)


def test_a_forward_that_was_put_on_the_model_before_apply_goes_on_too():
    plain, x = make("vit", torch.float32), example("vit", torch.float32)
    plain.forward = MethodType(doubled, plain)
    model = randomise_adapters(medpeft.apply(plain, "lora", target="blocks.1.*")).eval()
    split = medpeft.prefix(model, x)
    assert split.place == "the input of 'blocks.1'"
    assert torch.equal(split.rest(split.features(x)), model(x))


def test_checkpoint_inside_a_forward_of_the_user():
    class Recomputed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return self.head(checkpoint(self.body, x, use_reentrant=False))

    model = medpeft.apply(randomise(Recomputed()), "lora", target="body.1", head="head", rank=2)
    randomise_adapters(model)
    x = torch.randn(3, 4)
    split = medpeft.prefix(model, x)
    model(x).square().sum().backward()
    expected = gradients(model)
    split.rest(split.features(x)).square().sum().backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name])


def test_output_is_read_from_models_of_transformers():
    x = example("hf_vit", torch.float32)
    model = adapted("hf_vit").eval()
    split = medpeft.prefix(model, {"pixel_values": x}, output=lambda y: y.logits)
    assert torch.equal(split.rest(split.features({"pixel_values": x})), output(model, x))
