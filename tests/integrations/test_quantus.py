"""The page's explain function inside Quantus."""

import numpy as np
import pytest
import torch
from code_blocks import block_of
from models import build

from pyglobenc.methods.registry import METHODS

quantus = pytest.importorskip("quantus", reason="Quantus isn't installed: docs/integrations.md says how")
pytest.importorskip("captum", reason="captum isn't installed: pip install captum")


@pytest.fixture(scope="module")
def page():
    given = {}
    exec(compile(block_of("integrations.md", "import quantus"), "Quantus", "exec"), given)
    return given


@pytest.fixture
def images():
    pixels = np.random.default_rng(0).standard_normal((3, 3, 12, 12)).astype("float32")
    return build("vit", torch.float32), pixels, np.array([0, 1, 1])


@pytest.mark.parametrize("method", ["gradient-rollout", "transformer-attribution"])
def test_the_scores_are_those_of_the_call(page, images, method):
    model, pixels, classes = images
    found = page["explain"](page["Logits"](model).eval(), pixels, classes, method=method)
    batch, target = {"pixel_values": torch.tensor(pixels)}, torch.tensor(classes)
    exact = METHODS[method].run("test", model, "auto", None)(batch, target).scores[:, -9:]
    patches = torch.nn.functional.avg_pool2d(torch.tensor(found).sum(1), 4).flatten(1) * 16
    assert found.shape == pixels.shape
    assert (patches - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_metrics_run_on_it(page, images):
    model, pixels, classes = images
    quiet = dict(disable_warnings=True, display_progressbar=False)
    # A metric gives the same for the function as for its scores.
    metric = quantus.PixelFlipping(features_in_step=16, perturb_baseline="black", **quiet)
    found = page["measure"](metric, *images)
    logits = page["Logits"](model).eval()
    scores = page["explain"](logits, pixels, classes)
    given = metric(model=logits, x_batch=pixels, y_batch=classes, a_batch=scores, device="cpu")
    assert np.array_equal(found, given) and np.shape(found) == (3, 27)
    # This one perturbs the images, and the next one makes the weights random.
    found = page["measure"](quantus.MaxSensitivity(nr_samples=3, lower_bound=0.2, **quiet), *images)
    assert len(found) == 3 and min(found) > 0
    found = page["measure"](quantus.MPRT(**quiet), *images)
    assert np.allclose(found["original"], 1) and len(found) > 10
