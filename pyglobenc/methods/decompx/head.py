"""The head as a linear map, with the slopes f(z) / z of its activations held fixed."""

from dataclasses import dataclass

from torch import Tensor

from pyglobenc.methods.decompx.layers import Affine
from pyglobenc.methods.relevance.head_chain import Head, LinearStep, SumStep


@dataclass
class LinearHead:
    """A chain of Linear modules above the weighted sum of the tokens that the head reads.

    Attributes:
        weights: the weight of each token of the last layer's output, (B, n); for most heads 1 at one token.
        token_slopes: slope of an activation that is applied to each token, (B, n, d), or None.
        steps: the Linear modules, first to last, each with the slopes (B, inputs) of the activation before
            it. The last one computes all logits.
        index: the output of the last module that is explained, (B,).
        contrast: the output that is subtracted from it, (B,), or None.
    """

    weights: Tensor
    token_slopes: Tensor | None
    steps: list[tuple[Tensor, Affine]]
    index: Tensor
    contrast: Tensor | None

    @classmethod
    def of(cls, head: Head, top: Tensor) -> "LinearHead":
        """Return the map of a followed head.

        Args:
            head: the head, in the dtype of the arithmetic.
            top: output of the last layer in this dtype, (B, n, d).
        """
        modules = [step for step in reversed(head.steps) if isinstance(step, LinearStep)]
        weights, tokens = head.shares.to(top), top
        token_slopes = None
        if isinstance(head.steps[-1], SumStep):
            tokens = head.steps[-1].x.to(top)
            weights, token_slopes = head.steps[-1].weights.to(top), slope(tokens, top)
        below, steps = (weights[..., None] * tokens).sum(1), []
        for step in modules:
            affine = Affine.of(step.module, step.module.in_features, top.dtype)
            steps.append((slope(step.given[:, 0].to(top), below), Affine(*(t.to(top) for t in affine))))
            below = step.returned[:, 0].to(top) if step.returned.dim() == 3 else step.returned.to(top)
        return cls(weights, token_slopes, steps, head.index, head.contrast)

    def explained(self) -> tuple[Tensor, Tensor]:
        """Return weight (B, inputs) and bias (B,) of the logits explained."""

        def columns(t: Tensor) -> Tensor:
            found = t[..., self.index.to(t.device)]
            return found if self.contrast is None else found - t[..., self.contrast.to(t.device)]

        weight, bias = self.steps[-1][1]
        return columns(weight).T, columns(bias)

    def gradient(self) -> tuple[Tensor, Tensor]:
        """Return the logits' gradient (B, n, d) by the last layer's output, and the biases' part (B,)."""
        g, biases = self.explained()
        for (slopes, _), (_, affine) in zip(reversed(self.steps[1:]), reversed(self.steps[:-1]), strict=True):
            g = g * slopes
            biases = biases + g @ affine.bias
            g = g @ affine.weight.T
        g = (g * self.steps[0][0])[:, None] * self.weights[..., None]
        return g if self.token_slopes is None else g * self.token_slopes, biases


def slope(a: Tensor, z: Tensor) -> Tensor:
    """Return a / z for the input z and the output a of an activation, of one shape, and 0 where z is 0."""
    return (a / z).masked_fill_(z == 0, 0)
