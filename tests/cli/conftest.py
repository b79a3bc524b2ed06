"""The picture that commands on images read."""

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def cat(tmp_path):
    """Return the path of a picture of random pixels, 30 wide and 40 high."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "cat.png")
    return str(tmp_path / "cat.png")
