"""Any number of threads on one adapted model: every answer and every gradient is that of one thread."""

import copy
import os
import sys
import threading

import pytest
import torch
from every_method import CASES, adapted, base
from models import output
from torch import nn

import medpeft

ROUNDS = 12


@pytest.fixture(autouse=True)
def _switch_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def in_threads(*jobs):
    """Run the jobs at once; the errors that they ended with."""
    errors = []

    def run(job):
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return errors


def batches(x):
    return [x[:1], torch.cat([x, x.flip(0), x])]


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("case", CASES)
def test_threads_of_different_batch_sizes_training_beside_evaluation(case):
    model, x = adapted(case)
    inputs = batches(x)
    with torch.no_grad():
        right = [output(model, batch) for batch in inputs]
    wanted = torch.autograd.grad(output(model, x).square().sum(), trainable(model), allow_unused=True)

    def evaluate(i):
        with torch.no_grad():
            for _ in range(ROUNDS):
                torch.testing.assert_close(output(model, inputs[i]), right[i], rtol=1e-9, atol=1e-10)

    def train():
        for _ in range(ROUNDS):
            grads = torch.autograd.grad(output(model, x).square().sum(), trainable(model), allow_unused=True)
            for gradient, expected in zip(grads, wanted, strict=True):
                torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-9)

    assert in_threads(lambda: evaluate(0), lambda: evaluate(1), train) == []


@pytest.mark.parametrize("switch", ["disabled", "merged"])
@pytest.mark.parametrize(
    "case", ["lora", "ssf", "svdiff", "tsa", "bias", "fact", "svdiff in an attention", "lora in an encoder"]
)
def test_a_model_is_switched_beside_threads_that_run_it_and_every_answer_is_of_one_kind(case, switch):
    model, x = adapted(case)
    with torch.no_grad():
        adapted_output = output(model, x)
    with torch.no_grad(), medpeft.disabled(model):
        plain_output = output(model, x)
    assert not torch.allclose(adapted_output, plain_output)
    done = threading.Event()

    def evaluate():
        with torch.no_grad():
            while not done.is_set():
                y = output(model, x)
                is_adapted = torch.allclose(y, adapted_output, rtol=1e-9, atol=1e-10)
                assert is_adapted or (
                    switch == "disabled" and torch.allclose(y, plain_output, rtol=1e-9, atol=1e-10)
                )

    def toggle():
        try:
            for _ in range(ROUNDS):
                with medpeft.disabled(model) if switch == "disabled" else medpeft.merged(model):
                    with torch.no_grad():
                        y = output(model, x)
                    expected = plain_output if switch == "disabled" else adapted_output
                    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-10)
        finally:
            done.set()

    assert in_threads(evaluate, evaluate, toggle) == []
    with torch.no_grad():
        assert torch.equal(output(model, x), adapted_output)


def test_switching_inside_a_forward_beside_another_thread_is_refused():
    model, x = adapted("ssf")
    inside, leave = threading.Event(), threading.Event()
    here = threading.get_ident()
    errors = []

    def wait_or_switch(*_):
        if threading.get_ident() != here:
            inside.set()
            leave.wait(60)
            return
        try:
            with medpeft.disabled(model):
                pass
        except medpeft.MedpeftError as error:
            errors.append(str(error))

    model.blocks[0].register_forward_hook(wait_or_switch)
    other = threading.Thread(target=lambda: output(model, x))
    other.start()
    inside.wait(60)
    output(model, x)
    leave.set()
    other.join(60)

    assert len(errors) == 1
    assert (
        "disabled within a forward of the model, while another thread runs it, would wait for ever"
        in errors[0]
    )


def test_many_threads_give_what_one_gives():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)).eval()
    plain = copy.deepcopy(model)
    medpeft.apply(model, "svdiff", head="2")
    with torch.no_grad():
        model[0].adapters.svdiff.delta.add_(0.5)
        inputs = [torch.randn(1, 64), torch.randn(256, 64)]
        right = [model(x) for x in inputs]

    def serve(i):
        with torch.no_grad():
            for _ in range(200):
                assert torch.allclose(model(inputs[i]), right[i], atol=1e-4)

    assert in_threads(*[lambda i=i: serve(i % 2) for i in range(6)]) == []
    assert not set(vars(model[0])) & {"weight", "bias"}
    medpeft.remove(model)
    assert torch.equal(model(inputs[1]), plain(inputs[1]))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("case", ["svdiff", "lora", "svdiff in an attention"])
def test_a_process_forked_in_the_middle_of_a_forward_has_the_base(case):
    model, x = adapted(case)
    plain, inside, leave = output(base(case), x), threading.Event(), threading.Event()
    layers = [
        m
        for m in model.modules()
        if isinstance(m, (nn.Linear, nn.MultiheadAttention)) and "adapters" in m._modules
    ]
    own = layers[0].forward

    def slow(*args, **kwargs):
        result = own(*args, **kwargs)
        inside.set()
        leave.wait(60)
        return result

    for module in model.modules():  # Stops where a weight is adapted, whoever reads it.
        if any(layer in module.children() for layer in layers) or module in layers:
            module.register_forward_hook(lambda *_: (inside.set(), leave.wait(60))[0] and None)
    thread = threading.Thread(target=lambda: output(model, x))
    thread.start()
    assert inside.wait(60)
    child = os.fork()
    if child == 0:
        leave.set()
        with torch.no_grad(), medpeft.disabled(model):
            same = torch.allclose(output(model, x), plain, rtol=1e-9, atol=1e-10)
        os._exit(0 if same else 1)
    leave.set()
    thread.join(60)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
