"""Decompositions are computed once, found by their weight, and never read damaged."""

import warnings

import numpy as np
import pytest
import torch
from diffusion import svd_cache
from diffusion.svd_cache import caching, read_or_compute
from torch import nn

import medpeft
from medpeft.formulas import svd
from medpeft.formulas.svd import decompose

SHAPES = [(6, 4), (4, 6), (1, 5)]


def weight(shape=(6, 4), dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def files(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def computed(monkeypatch):
    """The weights that were decomposed anew."""
    seen, compute = [], svd.compute

    def noted(weight):
        seen.append(tuple(weight.shape))
        return compute(weight)

    monkeypatch.setattr(svd, "compute", noted)
    monkeypatch.setattr(svd_cache, "compute", noted)
    return seen


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_weight_is_decomposed_once_and_read_the_second_time(shape, dtype, tmp_path, computed):
    w = weight(shape, dtype)
    left, values, right = read_or_compute(w, tmp_path)
    again = read_or_compute(w.clone(), tmp_path)

    assert computed == [shape]
    assert all(torch.equal(a, b) for a, b in zip(again, (left, values, right), strict=True))
    assert values.dtype == torch.promote_types(dtype, torch.float32)
    product = left @ values.diag() @ right
    assert torch.allclose(product, w.to(product.dtype), atol=1e-5)


def test_other_values_another_shape_and_another_dtype_have_files_of_their_own(tmp_path, computed):
    zeros = torch.zeros(2, 6)
    for w in (weight(), weight(seed=1), weight(dtype=torch.float64), zeros, zeros.view(3, 4)):
        read_or_compute(w, tmp_path)

    assert len(computed) == len(files(tmp_path)) == 5


def test_without_a_directory_nothing_is_kept(tmp_path, monkeypatch, computed):
    monkeypatch.chdir(tmp_path)
    decompose(weight())
    decompose(weight())

    assert len(computed) == 2
    assert files(tmp_path) == []


def test_caching_names_the_directory_for_what_is_decomposed_within(tmp_path, computed):
    with caching(tmp_path / "new" / "cache") as directory:
        assert directory == tmp_path / "new" / "cache"
        assert svd._supply.get() is not None
        decompose(weight())
        decompose(weight())
    decompose(weight())

    assert svd._supply.get() is None
    assert len(computed) == 2
    assert len(files(directory)) == 1


def test_svdiff_decomposes_a_base_once(tmp_path, computed):
    def adapted():
        torch.manual_seed(0)
        return medpeft.apply(nn.Sequential(nn.Linear(4, 6), nn.Conv2d(2, 3, 1)), "svdiff", head=None)

    without = adapted()
    anew = len(computed)
    with caching(tmp_path):
        medpeft.plan(nn.Sequential(nn.Linear(4, 6)), "svdiff", head=None)
        assert files(tmp_path) == [], "a plan computes nothing"
        adapted()
        computed.clear()
        found = adapted()

    assert (anew, len(computed)) == (2, 0)
    pairs = zip(found[0].adapters["svdiff"].buffers(), without[0].adapters["svdiff"].buffers(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_weight_without_values_is_not_kept(tmp_path):
    with caching(tmp_path):
        left, values, right = decompose(torch.empty(4, 3, device="meta"))
    assert (left.shape, values.shape, right.shape) == ((4, 3), (3,), (3, 3))
    assert files(tmp_path) == []


def test_a_cache_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(medpeft.CheckpointError, match="cannot be made"), caching(tmp_path / "file" / "cache"):
        pass


def _cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def _replace(path):
    other = path.parent / "other"
    other.mkdir()
    read_or_compute(weight(seed=1), other)
    next(other.iterdir()).replace(path)
    other.rmdir()


def _scramble(path):
    data = bytearray(path.read_bytes())
    data[-30:] = bytes(30)
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [_cut, _replace, _scramble])
def test_a_damaged_file_is_computed_anew_with_a_warning_and_replaced(damage, tmp_path):
    good = read_or_compute(weight(), tmp_path)
    damage(next(tmp_path.iterdir()))

    with pytest.warns(UserWarning, match="computed anew"):
        again = read_or_compute(weight(), tmp_path)

    assert all(torch.equal(a, b) for a, b in zip(again, good, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_or_compute(weight(), tmp_path)


@pytest.mark.parametrize("shape", [(12, 100), (100, 12), (30, 40)])
@pytest.mark.parametrize("kind", ["random", "of low rank", "of wide range"])
def test_the_decomposition_is_one_whatever_the_shape_and_the_spectrum(shape, kind):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    if kind == "of low rank":
        weight = weight[:, :5] @ torch.randn(5, shape[1])
    if kind == "of wide range":
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        weight = (left * torch.logspace(0, -4.5, len(values))) @ right

    left, values, right = decompose(weight)

    rank = min(shape)
    expected = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    assert (left.shape, values.shape, right.shape) == ((shape[0], rank), (rank,), (rank, shape[1]))
    assert {tensor.dtype for tensor in (left, values, right)} == {torch.float32}
    assert ((left * values) @ right - weight).norm() < 1e-5 * weight.norm()
    assert (values - torch.tensor(expected)).abs().max() < 1e-5 * values[0]
    assert (left.t() @ left - torch.eye(rank)).abs().max() < 1e-4
    assert (right @ right.t() - torch.eye(rank)).abs().max() < 1e-4
