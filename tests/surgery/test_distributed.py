"""The same training run in one process, in DDP and in FSDP2: the same weights, checkpoints, merged and removed adapters."""

import os
import subprocess
import sys

import pytest
import torch
from golden.model import Golden, fill
from models import randomise_adapters
from places import IMPORTABLE, TESTS
from torch import nn

import medpeft

# On outputs, on inputs, on weights through covers (tsa's 1×1 convolution, dora), in a tapped block, existing parameters, and
# modules that layers share.
METHODS = {
    "lora+bias": {"rank": 2},
    "ssf": {},
    "tsa": {},
    "adaptformer": {"bottleneck": 4, "dropout": 0.0},
    "svdiff": {"keep_svd": True},
    "lora": {"rank": 2, "dora": True, "target": "*"},
    "repadapter+ia3": {"bottleneck": 2},
    "fact": {"rank": 2},
    "bn": {},
    "full": {"batchnorm": "frozen"},
}


class Reader(nn.Module):
    """A module that reads its layer's weight without calling it, as timm's BEiT does."""

    def __init__(self):
        super().__init__()
        self.read = nn.Linear(4, 4)
        self.attn = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = x.flatten(1)[:, :20].unflatten(1, (5, 4))
        x = nn.functional.linear(x, self.read.weight, self.read.bias)
        return self.head(self.attn(x, x, x)[0].mean(1))


READERS = {
    "read": ("lora", {"rank": 2, "target": "*"}),
    "read svdiff": ("svdiff", {"target": "*", "keep_svd": True}),
}
CASES = [*METHODS, *READERS]
REMOVED = (
    "adaptformer",
    "bn",
)  # In place of merging: the one cannot be merged, the other has nothing to merge.


def adapted(case):
    """A model in float64, adapted, with nothing at zero; its layers in the order in which FSDP2 shards them."""
    base = Reader() if case in READERS else Golden()
    fill(base)
    base.double()
    method, options = READERS.get(case) or (case, METHODS[case])
    return randomise_adapters(medpeft.apply(base, method, **options))


def layouts(case):
    """What is sharded by itself.

    FSDP2 gathers a layer when it is called: one that is read instead cannot be a shard.
    """
    return ("blocks", "root") if case in READERS else ("blocks", "layers", "root")


def bare(case):
    base = Reader() if case in READERS else Golden()
    fill(base)
    return base.double()


def batch():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 1, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (8,), generator=generator)


def train(model, x, target):
    """Three steps of SGD with momentum, the first ones that show a wrong gradient, scale or buffer."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()


SCRIPT = """
import sys, torch, medpeft
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from test_distributed import CASES, REMOVED, adapted, bare, batch, layouts, train

torch.set_num_threads(1)
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
x, target = (tensor.chunk(2)[rank] for tensor in batch())

for case in CASES:
    model = adapted(case)
    train(DistributedDataParallel(model), x, target)
    if rank == 0:
        medpeft.save(model, f"{folder}/ddp-{case}.safetensors")

    for layout in layouts(case):
        model = adapted(case)
        parts = {
            "blocks": [m for n, m in model.named_children() if n in ("layer", "blocks", "attn")],
            "layers": [m for m in model.modules() if type(m).__name__ in ("Linear", "Conv2d", "LayerNorm", "Block")],
            "root": [],
        }[layout]
        for part in reversed(parts):
            fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)
        train(model, x, target)
        medpeft.save(model, f"{folder}/{layout}-{case}.safetensors")
        if layout == "blocks":
            # A forward leaves whole tensors in the place of shards: what is written to those alone is lost with them.
            base, before = bare(case).eval()(x), model.eval()(x)
            if case != "full":
                with medpeft.disabled(model):
                    assert torch.allclose(model(x), base), f"{case} is not the base while disabled"
                model.reshard()
                assert torch.equal(model(x), before)
            if case not in REMOVED:
                with medpeft.merged(model):
                    assert torch.allclose(model(x), before), f"{case} merged for a while computes something else"
                model.reshard()
                assert torch.equal(model(x), before)
            medpeft.load(model, f"{folder}/ddp-{case}.safetensors")
            model.reshard()
            medpeft.save(model, f"{folder}/swapped-{case}.safetensors")
            before = model(x)
            if case in REMOVED:
                medpeft.remove(model)
                model.reshard()
                assert torch.allclose(model(x), base), f"{case} is not the base when removed"
            else:
                medpeft.merge(model)
                model.reshard()
                assert torch.allclose(model(x), before), f"{case} computes something else when merged"
                state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
                if rank == 0:
                    torch.save(state, f"{folder}/merged-{case}.pt")
    dist.barrier()

for wrap, name in ((lambda m: fully_shard(m, mesh=mesh), "FSDPModule"), (DistributedDataParallel, "DistributedDataParallel")):
    try:
        medpeft.apply(wrap(bare("ssf")), "lora")
    except medpeft.MedpeftError as error:
        assert f"is in {name} already" in str(error), error
    else:
        raise AssertionError(f"each rank would train adapters of its own in {name}")

model = medpeft.apply(bare("ssf"), "lora+bias", rank=2)
fully_shard(model, mesh=mesh)
model(x)
medpeft.remove(model)
model.reshard()
assert torch.allclose(model.eval()(x), bare("ssf").eval()(x)), "selected parameters are not those of the base"
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints of every case, trained by two processes."""
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "script.py").write_text(SCRIPT)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(folder / "script.py"), str(rank), str(folder)],
            env={**os.environ, "PYTHONPATH": f"{IMPORTABLE}:{TESTS}/surgery"}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    errors = [process.communicate(timeout=300)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(errors)
    return folder


@pytest.mark.parametrize(
    ("case", "run"), [(case, run) for case in CASES for run in ("ddp", "swapped", *layouts(case))]
)
def test_two_processes_train_what_one_does_and_their_checkpoint_loads_into_a_plain_model(case, run, folder):
    alone, before = adapted(case), adapted(case)
    train(alone, *batch())
    loaded = medpeft.load(bare(case), folder / f"{run}-{case}.safetensors")

    found, expected = loaded.state_dict(), alone.state_dict()
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=1e-9, atol=1e-11), name
    moved = {n for n, t in before.state_dict().items() if not torch.equal(t, expected[n])}
    assert moved >= {n for n, p in alone.named_parameters() if p.requires_grad} - {"head.bias"}, (
        "training changed nothing"
    )


@pytest.mark.parametrize("case", [case for case in CASES if case not in REMOVED])
def test_a_sharded_model_merges_into_the_weights_that_a_plain_one_does(case, folder):
    plain = medpeft.merge(medpeft.load(bare(case), folder / f"ddp-{case}.safetensors"))
    found, expected = torch.load(folder / f"merged-{case}.pt"), plain.state_dict()
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=1e-9, atol=1e-11), name
