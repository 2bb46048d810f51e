"""What every test starts from: one thread, no state left over from another test."""

import gc

import pytest
import torch

from medpeft.adapters import registry

# What these assert says what it found, as if it stood in the test.
pytest.register_assert_rewrite(
    "block_oracles", "layer_oracles", "checkpoints", "small_checkpoints", "small_diffusion", "small_training"
)


def pytest_collection_modifyitems(items):
    """Skip what needs a GPU, where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_collection_finish():
    """Spare the collector of garbage what stays for good, and let it run more seldom."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


def pytest_unconfigure():
    """Free at the end what extension modules would else call leaked."""
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Tiny models gain nothing from more threads, and test processes share the cores."""
    torch.set_num_threads(1)


@pytest.fixture
def own_registry(monkeypatch):
    """Methods that a test registers stay in it."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
