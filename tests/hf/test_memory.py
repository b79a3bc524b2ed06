"""The memory contract for causal and local attention, for scores with a bias or a cap, and for padding on the
left.
"""

import pytest
import torch
from allocations import measure_allocations
from models import build, random_batch
from sweeps import slow

from pyglobenc import GlobEnc

N = 400
FLOAT = 4
N_PADS = 37  # the first real token is the target: a head that reads position 0 would read padding


def used(name, n):
    """Allocations of the second call, and of the plain forward pass."""
    model = build(name, torch.float32, max_position_embeddings=2 * N + 2)
    globenc, batch = GlobEnc(model), random_batch(model, batch=1, n=n, pads=[N_PADS], side="left")
    globenc(**batch, targets=[N_PADS])
    with torch.no_grad():
        return measure_allocations(lambda: globenc(**batch, targets=[N_PADS])), measure_allocations(
            lambda: model(**batch)
        )


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma3", "gemma2", "modernbert"])
def test_row_mode_is_linear(name):
    (small, _), (large, _) = used(name, N), used(name, 2 * N)
    assert large.largest < (2 * N) ** 2 * FLOAT / 2, "an n*n array of one head would be larger"
    assert large.peak <= 2.1 * small.peak


@pytest.mark.parametrize("name", ["mpnet", slow("deberta-v3")])
def test_nothing_larger_than_the_forward_pass_makes(name):
    """These models make (H, n, n) scores themselves."""
    (small, forward_small), (large, forward) = used(name, N), used(name, 2 * N)
    assert large.largest <= forward.largest
    assert large.peak - forward.peak <= 2.1 * max(0, small.peak - forward_small.peak) + 2 * N * 48 * FLOAT
