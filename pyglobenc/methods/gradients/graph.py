"""What of an autograd graph depends on the first layer's input, and whether all of it follows rules."""

import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge

# Nodes of the autograd graph that are linear in all their inputs together, without "Backward0".
LINEAR = set(
    "Add Alias AsStrided Cat Clone ConstantPadNd Copy CopyBackwards Cumsum Diagonal Expand Flip Gather "
    " Index IndexAdd IndexPut IndexSelect MaskedFill MaskedScatter Mean Neg Permute Repeat "
    "ReshapeAlias Roll Rsub Scatter ScatterAdd Select Slice Split SplitWithSizes Squeeze Stack Sub Sum T "
    "ToCopy Topk Transpose Unbind Unfold UnsafeView Unsqueeze View Where".split()
)
# Nodes that are linear if at most one of the inputs at these places depends on the first layer's input.
FACTORS = {
    "Addmm": (1, 2),
    "Baddbmm": (1, 2),
    "Bmm": (0, 1),
    "Convolution": (0, 1),
    "Dot": (0, 1),
    "GroupedMm": (0, 1),
    "Mm": (0, 1),
    "Mul": (0, 1),
    "Mv": (0, 1),
}


def kind(node: Any) -> str:
    """Return a graph node's name without its number, such as "Mul" for MulBackward0.

    A function that is defined in Python keeps its whole name, since anyone may call it as torch's are called.
    """
    if isinstance(node, BackwardCFunction):
        return node.name()
    return re.sub(r"Backward\d*$", "", node.name().rsplit(":", 1)[-1])


class Graph:
    """The autograd graph of one forward pass that starts at a tensor x (B, n, d)."""

    def __init__(self, x: Tensor):
        # Whether each node depends on x.
        self._known: dict[Any, bool] = {get_gradient_edge(x).node: True}
        # Nodes whose inputs follow the rules together, with the nodes of these inputs.
        self._trusted: dict[Any, list[Any]] = {}

    def depends(self, t: Any) -> bool:
        """Tell whether t, if it is a tensor, is computed from x."""
        return isinstance(t, Tensor) and t.requires_grad and self._reaches(get_gradient_edge(t).node)

    def _reaches(self, node: Any) -> bool:
        known, waiting = self._known, [node]
        while waiting:
            top = waiting[-1]
            below = [] if top in known else [n for n, _ in top.next_functions if n is not None]
            unknown = [n for n in below if n not in known]
            if unknown:
                waiting += unknown
                continue
            if top not in known:
                known[top] = any(known[n] for n in below)
            waiting.pop()
        return known[node]

    def trust(self, output: Tensor, inputs: Iterable[Tensor]) -> None:
        """Note that the rules hold between tensors of any shapes, whatever the graph between them is."""
        nodes = [get_gradient_edge(t).node for t in inputs if self.depends(t)]
        if output.requires_grad and output.grad_fn not in nodes:
            self._trusted[output.grad_fn] = nodes

    def below(self, node: Any) -> list[Any]:
        """Return the nodes of a node's inputs, with None for inputs that don't depend on x."""
        return [n if n is not None and self._reaches(n) else None for n, _ in node.next_functions]

    def is_mean_square(self, node: Any) -> bool:
        """Tell whether a node is a mean or sum of squares, with constants added or multiplied."""
        while kind(node) in ("Add", "Mul", "Div", "Mean", "Sum", "Expand", "ToCopy"):
            below = [n for n in self.below(node) if n is not None]
            if len(below) != 1:
                return False
            node = below[0]
        return kind(node) == "Var" or (kind(node) == "Pow" and node._saved_exponent == 2)

    def without_rule(self, logit: Tensor, has_rule: Callable[[Any], bool]) -> Any | None:
        """Return a node between the logits (any shape) and x that is neither linear nor has a rule."""
        waiting, seen = [get_gradient_edge(logit).node] if logit.requires_grad else [], set()
        while waiting:
            node = waiting.pop()
            if node in seen or not self._reaches(node):
                continue
            seen.add(node)
            if node in self._trusted:
                waiting += self._trusted[node]
                continue
            below = self.below(node)
            # A node without inputs is x itself.
            if any(n is not None for n in below) and not (has_rule(node) or _is_linear(node, below)):
                return node
            waiting += [n for n in below if n is not None]
        return None


def _is_linear(node: Any, below: list[Any]) -> bool:
    if kind(node) in FACTORS:
        return sum(below[i] is not None for i in FACTORS[kind(node)] if i < len(below)) <= 1
    if kind(node) == "Div":
        return len(below) == 1 or below[1] is None
    return kind(node) in LINEAR
