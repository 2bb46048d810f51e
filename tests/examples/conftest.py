"""What tests of several examples start from."""

import pytest
from small_diffusion import draw_spots, save_pipeline
from small_training import draw_stripes


@pytest.fixture(scope="module")
def spots(tmp_path_factory):
    """Folder of captioned images of dark and light spots."""
    return draw_spots(tmp_path_factory.mktemp("spots"))


@pytest.fixture(scope="module")
def tiny_pipeline(tmp_path_factory):
    """Folder of an untrained Stable Diffusion pipeline."""
    return save_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def stripes(tmp_path_factory):
    """Folder of images of stripes, across and down."""
    return draw_stripes(tmp_path_factory.mktemp("stripes"))
