"""What a layer of GlobEnc launches on a GPU beside the forward pass: a short input waits for the host."""

from collections import Counter

import torch
from models import build, random_batch
from torch.utils._python_dispatch import TorchDispatchMode

from pyglobenc import GlobEnc
from pyglobenc.hf.trace import projections

# torch's operations that launch nothing
FREE = {"detach", "view", "_unsafe_view", "transpose", "t", "unsqueeze", "squeeze", "select", "slice",
        "expand", "permute", "empty", "empty_like", "new_empty"}  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts torch's operations by name, those of this package among them."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in FREE:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def a_layer_s(call_of):
    """Operations of one layer, from models of 5 and 2."""
    counts = []
    for depth in (5, 2):
        model = build("bert", torch.float32, num_hidden_layers=depth)
        batch = random_batch(model, batch=1, n=6)
        call = call_of(model)
        call(**batch)
        with Launches() as launches:
            call(**batch)
        counts.append(launches.counts)
    return Counter({name: count / 3 for name, count in (counts[0] - counts[1]).items()})


def test_globenc_adds_few(emulated, monkeypatch):
    # The kernel of the checks on a CPU has no operations, and none on a GPU.
    monkeypatch.setattr(projections, "KERNEL", None)
    plain = a_layer_s(lambda model: torch.no_grad()(model.forward))
    ours = a_layer_s(lambda model: GlobEnc(model, backend="cuda"))
    # of this package, beside the product of the row's two scales
    own = Counter(["head_gram_cross", "mapped_square", "rollout_step", "mul"])
    # that the layer is the one that is decomposed; clone: torch's attention on a CPU returns a transposed lse
    checks = Counter(mv=7, sub=4, mul=4, mean=4, linalg_vector_norm=2, mm=1, clone=1)
    assert ours - plain == own + checks
    assert plain - ours == Counter()


def test_kernels_of_a_layer(emulated):
    counts = []
    for depth in (5, 2):
        model = build("bert", torch.float32, num_hidden_layers=depth)
        emulated.launches()
        GlobEnc(model, backend="cuda")(**random_batch(model, batch=1, n=6))
        counts.append(len(emulated.launches()))
    # head_gram, mapped_square, and rollout_step's queries and forms packed, its pairs, its rows scaled
    assert counts[0] - counts[1] == 3 * 5
