"""`fits` forecasts the peak of a step from tensors that come and go, and orders what fits."""

import pytest
import torch
from models import example, make
from torch import nn
from torch.profiler import ProfilerActivity, profile

import medpeft
from medpeft.architecture.checkpointing import switch_on_checkpointing
from medpeft.reports.peak import forecast


def measured(model, x):
    """Most bytes of torch's allocator in a step, and what is there before: model, input, state of AdamW."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, foreach=False)

    def step():
        returned = model(x)
        getattr(returned, "logits", returned).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    held = [*model.parameters(), *model.buffers(), x]
    state = [value for values in optimizer.state.values() for value in values.values()]
    return peak + sum(tensor.nbytes for tensor in held + state)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["full", "lora", "ssf", "linear_probe"])
@pytest.mark.parametrize("name", ["vit", "resnet", "hf_vit"])
def test_the_forecast_is_the_peak_of_a_real_step(name, method, checkpointing):
    x = example(name, torch.float32).repeat(32, 1, 1, 1)
    model = medpeft.apply(make(name, torch.float32), method)
    if checkpointing:
        assert switch_on_checkpointing(model)
    found, real = forecast(model, x).peak_bytes, measured(model, x)
    assert abs(found - real) <= 0.05 * real, (found, real)


def test_the_peak_by_hand():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    step = forecast(medpeft.apply(model, "linear_probe", head="2"), torch.randn(500, 8), optimizer_states=0)
    held = 4 * (8 * 16 + 16 + 16 * 4 + 4 + 500 * 8)
    # ReLU has its input and its output at once.
    assert step.peak_bytes == held + 4 * 2 * 500 * 16
    full = nn.Sequential(nn.Linear(512, 512, bias=False))
    # One image: weight, two states, gradient, and two more of its size in the optimizer.
    assert forecast(full, torch.randn(1, 512)).peak_bytes == 4 * (6 * 512 * 512 + 512)


def test_rows_that_fit_come_first_the_deepest_and_largest_of_them_first():
    model, x = make("vit", torch.float32), torch.randn(64, 3, 32, 32)
    selections = [{}, {"target": "blocks.1.*"}]
    found = medpeft.fits(model, x, memory=3 * 2**20, methods=["full", "lora"], selections=selections)
    by_way = {
        (row.keywords["method"], "target" in row.keywords, row.checkpointing): row for row in found.rows
    }
    order = [(not row.fits, -round(8 * row.depth), -row.trainable, row.checkpointing) for row in found.rows]
    assert order == sorted(order)
    assert {row.fits for row in found.rows} == {True, False}
    assert found.best is found.rows[0]
    assert by_way["full", False, False].depth == 1.0
    assert 0.3 < by_way["full", True, False].depth < 0.6
    assert len(found.rows) == 6  # One block alone gains nothing by checkpointing.
    for method in ("full", "lora"):
        with_it, without = by_way[method, False, True], by_way[method, False, False]
        assert with_it.peak_bytes < without.peak_bytes
        assert with_it.training_flops > without.training_flops
        assert with_it.trainable == without.trainable
    assert found.to_dict()["rows"][0]["keywords"] == found.rows[0].keywords
    assert str(found).splitlines()[-1].endswith("fit into 3.0 MiB; these come first")
    assert "| full | target=blocks.1.* |" in found.to_markdown()
    adapted = medpeft.apply(model, **by_way["lora", True, False].keywords)
    assert forecast(adapted, x).peak_bytes == by_way["lora", True, False].peak_bytes


def test_the_model_and_the_random_state_stay_and_nothing_is_computed():
    model, drawn = make("resnet", torch.float32), torch.get_rng_state()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = medpeft.fits(model, torch.empty(64, 3, 32, 32), methods=["lora", {"ssf": {}}])
    assert all(row.fits for row in found.rows)
    assert torch.equal(drawn, torch.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not hasattr(model.layer1[0].conv1, "adapters")
    assert not model.grad_checkpointing


def test_what_does_not_fit_the_model_is_left_out_with_the_reason():
    model, x = make("resnet", torch.float32), torch.empty(2, 3, 32, 32)
    found = medpeft.fits(model, x, methods=["adaptformer", "bias"])
    assert {row.keywords["method"] for row in found.rows} == {"bias"}
    assert "adaptformer: 'adaptformer' found nothing to train in ResNet" in str(found)
    with pytest.raises(medpeft.MedpeftError, match="No method trains this ResNet:\n  adaptformer:"):
        medpeft.fits(model, x, methods=["adaptformer"])
    with pytest.raises(medpeft.MedpeftError, match="memory=0 is no number of bytes"):
        medpeft.fits(model, x, memory=0)
    assert medpeft.fits(model, x, memory=1, methods=["bias"]).best is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"memory": "6 GiB"},
        {"methods": "lora"},
        {"methods": None},
        {"selections": {"head": "fc"}},
        {"selections": ["fc"]},
        {"optimizer_states": -1},
        {"optimizer_states": "adam"},
    ],
)
def test_arguments_that_make_no_sense_are_named(wrong):
    (name,) = wrong
    with pytest.raises(medpeft.MedpeftError, match=f"{name}=.* must be"):
        medpeft.fits(torch.nn.Linear(2, 2), torch.empty(1, 2), **wrong)


def test_the_last_half_and_quarter_are_tried():
    model, x = make("vit", torch.float32), example("vit", torch.float32)
    found = medpeft.fits(model, x, methods=["lora"])
    depths = [row.keywords["depth"] for row in found.rows if not row.checkpointing]
    # The model has two blocks, so its last half and quarter are one block.
    assert depths == [1.0, 0.5]
    peaks = [row.peak_bytes for row in found.rows if not row.checkpointing]
    assert peaks[0] > peaks[1]


def test_models_without_a_switch_for_checkpointing_have_no_row_with_it():
    assert not switch_on_checkpointing(nn.Linear(2, 2))
    assert not switch_on_checkpointing(make("densenet", torch.float32).features)
    found = medpeft.fits(make("torchvision_resnet"), torch.empty(2, 3, 32, 32), methods=["lora"])
    assert len(found.rows) == 3
    assert not any(row.checkpointing for row in found.rows)
