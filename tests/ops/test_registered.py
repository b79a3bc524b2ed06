"""What looks at ops from outside (torch.compile, fake tensors, autograd) sees them, though plain calls go
past the dispatcher.
"""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pyglobenc.ops import head_gram

V, KERNEL = (2, 4, 5, 8), (4, 8, 4, 8)


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **kwargs or {})


def test_compiled_graphs_hold_the_op():
    targets = []

    def backend(graph, inputs):
        targets.extend(node.target for node in graph.graph.nodes)
        return graph

    v, kernel = torch.randn(V), torch.randn(KERNEL)
    out = torch.compile(lambda: head_gram(v, kernel)[0], fullgraph=True, backend=backend)()
    assert torch.ops.pyglobenc.head_gram.default in targets
    assert torch.equal(out, head_gram(v, kernel)[0])


def test_fake_tensors_are_never_computed():
    with FakeTensorMode():
        gram, _ = head_gram(torch.randn(V), torch.randn(KERNEL))
    assert gram.shape == (2, 5, 4, 4) and type(gram) is not torch.Tensor


def test_dispatch_modes_see_the_op():
    with Watch() as watch:
        head_gram(torch.randn(V), torch.randn(KERNEL))
    assert torch.ops.pyglobenc.head_gram.default in watch.seen


def test_gradients_are_refused():
    v = torch.randn(V, requires_grad=True)
    with pytest.raises(RuntimeError, match="autograd"):
        head_gram(v, torch.randn(KERNEL))[0].sum().backward()
    with torch.no_grad():
        assert not head_gram(v, torch.randn(KERNEL))[0].requires_grad
