"""The linear part of DecompX: what each token and all biases give to the logit, by one pass down.

With the attention probabilities, standard deviations and slopes held fixed, the logit is a linear function of
the first layer's input x and of every bias. The gradient g of this function is propagated from the logit
down. The scores are <g, x> for each token, and the biases' part is the sum of <g, b> over all places of a
bias. The first layer's values count with their bias, as in the published code.

This takes 10 d^2 + 2 n d multiply-adds for a token and layer, where the forward pass takes 12 d^2 + 2 n d.
"""

import torch
from torch import Tensor

from pyglobenc.common.deferred import require
from pyglobenc.methods.decompx.layers import WHO, LinearLayer
from pyglobenc.methods.decompx.states import States
from pyglobenc.methods.differentiable import by_head

# A layer computes about eight vectors of each token. The half unit by which each is rounded moves <g, t> by
# at most half a unit of |g| |t|. On random models of five architectures, gaps were below 5 % of this bound.
MARGIN = 4


class LinearPass:
    """One pass from the logit down to the first layer's input.

    Attributes:
        scores: (B, n), the part of each token; set by `run`.
        biases: (B,), the part of all biases met so far.
        gaps: by layer number, the difference (B,) of the logit and the parts of the layer's input and of the
            biases above; the number of layers stands for the last layer's output.
        sizes: (B,) for each entry of gaps, the sum of |g| |t| over the tokens, which bounds the parts.
    """

    def __init__(self, states: States):
        self.states, self.scores = states, None
        self.biases = torch.zeros_like(states.target.logit, dtype=states.dtype)
        self.gaps: dict[int, Tensor] = {}
        self.sizes: dict[int, Tensor] = {}

    def run(self) -> "LinearPass":
        """Compute the scores and the biases' part, and return self."""
        states, depth = self.states, len(self.states.traces)
        g, self.biases = states.head.gradient()
        self._compare(depth, g, states.top)
        for index in reversed(range(depth)):
            layer = states.layer(index)
            below, g_v = self._attention(layer, self._mlp(layer, g.to(layer.x.device)))
            if index == 0:
                self.scores = (below * layer.x).sum(-1) + (g_v * layer.v).sum((1, 3))
                self.gaps[0] = self._gap(self.scores.sum(1))
                self.sizes[0] = self.scores.abs().sum(1)
                break
            self._add(g_v.transpose(1, 2).flatten(2), layer.value.bias)
            g = below + g_v.transpose(1, 2).flatten(2) @ layer.value.weight.T
            self._compare(index, g, layer.x)
        return self

    def _mlp(self, layer: LinearLayer, g: Tensor) -> Tensor:
        """Return the gradient of y, from that of the layer's output."""
        self._add(g, layer.norms[1].beta)
        g = layer.norms[1].back(g)
        self._add(g, layer.mlp_output.bias)
        units = layer.units_back(g)
        self._add(units, layer.intermediate.bias)
        return g + units @ layer.intermediate.weight.T

    def _attention(self, layer: LinearLayer, g: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of the residual (B, n, d) and of the values (B, H, n, dh), from that of y."""
        self._add(g, layer.norms[0].beta)
        g = layer.norms[0].back(g)
        self._add(g, layer.output.bias)
        return g, layer.values_back(by_head(g @ layer.output.weight.T, layer.trace))

    def _add(self, g: Tensor, bias: Tensor) -> None:
        self.biases = self.biases + (g.sum(1) @ bias).to(self.biases.device)

    def _gap(self, tokens: Tensor) -> Tensor:
        return self.states.target.logit.to(tokens) - tokens - self.biases.to(tokens.device)

    def _compare(self, index: int, g: Tensor, t: Tensor) -> None:
        t = t.to(g)
        self.gaps[index] = self._gap((g * t).sum((1, 2)))
        self.sizes[index] = (torch.linalg.vector_norm(g, dim=-1) * torch.linalg.vector_norm(t, dim=-1)).sum(1)

    def check(self) -> None:
        """Check at each layer that the parts of its input and of the biases above add up to the logit.

        Raises:
            ValueError: they don't. The message names the highest layer where they don't.
        """
        depth, width = len(self.states.traces), self.states.top.shape[2]
        eps = MARGIN * (self.states.eps + width**0.5 * torch.finfo(self.states.dtype).eps)
        home = self.biases.device
        # A layer's parts carry the rounding of all layers above.
        allowed = torch.stack([self.sizes[index].to(home) for index in reversed(range(depth + 1))]).cumsum(0)
        gaps = torch.stack([self.gaps[index].to(home) for index in reversed(range(depth + 1))])
        holds = gaps.abs() <= eps * allowed

        def error() -> ValueError:
            index = depth - int((~holds).any(1).nonzero()[0])
            where = "the head computes" if index == depth else f"layer {index} (counted from 0) computes"
            return ValueError(
                f"{WHO}: {where} something else than the decomposition assumes: what its input and the "
                "biases above give to the logit doesn't add up to the logit"
            )

        require(holds.all(), error)
