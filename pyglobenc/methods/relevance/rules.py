"""The relevance rules with their options, over the ops; and the same steps under the LRP baseline's rules."""

from typing import Any

import torch
from torch import Tensor, nn

from pyglobenc.backends.shared.safe_division import safe_divide
from pyglobenc.hf import LayerTrace
from pyglobenc.ops import (
    add_relevance,
    clone_relevance,
    linear_relevance,
    relevance_attention,
    relevance_rollout_step,
)


class Rules:
    """Deep Taylor rules of Chefer et al., 2021, for one call.

    Args:
        backend: "auto" or a backend's name.
        stabilizer: of the divisions by sums of both signs (residual sum, attention output, scores): 0 for the
            published guard, e > 0 for a sign-aware one.
    """

    rescale = True  # residual sums keep each branch's share of the total

    def __init__(self, backend: str, stabilizer: float = 0.0):
        self.backend = backend
        self.stabilizer = stabilizer
        self._memory: Tensor | None = None

    def linear(self, r: Tensor, module: nn.Linear, given: Tensor, returned: Tensor) -> Tensor:
        """Relevance (B, n, d_in) of a Linear's input from that of its output (B, n, d_out)."""
        r, bias = r.to(given.device), None if module.bias is None else module.bias.detach()
        weight, absolute = module.weight.detach(), self._absolute(module.weight.detach(), r.dtype)
        return linear_relevance(
            r, given, weight, abs_weight=absolute, output=returned, bias=bias, backend=self.backend
        )

    def _absolute(self, weight: Tensor, dtype: torch.dtype) -> Tensor | None:
        """|W| (d_out, d_in), until the next call of this; None where it would have to be widened.

        One module's at a time is in one piece of memory: new memory for each took 8 % of a call of BERT-base
        at 128 tokens.
        """
        memory = self._memory
        if weight.dtype != dtype:
            return None
        if (
            memory is None
            or memory.numel() < weight.numel()
            or memory.device != weight.device
            or memory.dtype != dtype
        ):
            memory = self._memory = weight.new_empty(weight.numel())
        return torch.abs(weight, out=memory[: weight.numel()].view(weight.shape))

    def token_sum(self, r: Tensor, x: Tensor, weights: Tensor) -> Tensor:
        """Relevance of tokens x (B, n, d) from that of their sum with weights (B, n), r (B, 1, d): the rule
        of a Linear whose weights are positive. A sum of one token with weight 1 is the token itself.
        """
        r, parts = r.to(x.device), x.clamp(min=0) * weights[..., None]
        out = parts * safe_divide(r, parts.sum(1, keepdim=True))
        alone = (weights == 1).any(1) & (weights.count_nonzero(1) == 1)
        return torch.where(alone[:, None, None], r * weights[..., None], out)

    def add(self, r: Tensor, a: Tensor, b: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Relevance of both branches of a residual sum, (B, n, d)."""
        options = dict(
            stabilizer=self.stabilizer, rescale=self.rescale, cu_seqlens=cu_seqlens, backend=self.backend
        )
        return add_relevance(r.to(a.device), a, b, **options)

    def clone(self, parts: list[Tensor], x: Tensor) -> Tensor:
        """Relevance of a tensor read by several branches, (B, n, d)."""
        return clone_relevance(parts, x, backend=self.backend)

    def total(self, parts: list[Tensor]) -> Tensor:
        """Relevance of a tensor read by modules that the published code takes for one, (B, n, d)."""
        return sum(parts)

    def over_output(self, r_o: Tensor, layer: LayerTrace) -> Tensor:
        """s = R_o / safe(o) by head, (B, H, n, dh), from relevance (B, n, d) of a layer's attention
        output.
        """
        return safe_divide(r_o.unflatten(2, (layer.o.shape[1], -1)).transpose(1, 2), layer.o, self.stabilizer)

    def attention(
        self, layer: LayerTrace, grad_o: Tensor | None, s: Tensor, roll: Tensor | None, normalize: bool
    ) -> tuple[list[Tensor], Tensor | None]:
        """Relevance of queries, keys and values, (B, n, d) each, and the stepped rollout (B, T, n) or
        None.
        """
        *parts, _, rolled = self._attention(layer, grad_o, s, roll, normalize)
        return [t.transpose(1, 2).flatten(2) for t in parts], rolled

    def _attention(
        self, layer: LayerTrace, grad_o: Tensor | None, s: Tensor, roll: Tensor | None, normalize: bool
    ) -> tuple:
        settings = self.seen(layer) | dict(additive_mask=not layer.modules.pre_norm, normalize=normalize)
        rules = dict(stabilizer=self.stabilizer, rescale=self.rescale, backend=self.backend)
        return relevance_attention(
            layer.q, layer.k, layer.v, layer.lse, grad_o, s, r=roll, **settings, **rules
        )

    @staticmethod
    def seen(layer: LayerTrace) -> dict[str, Any]:
        """Which keys a query of the layer sees, and the scale of its scores, as the ops take them."""
        names = ("key_mask", "scaling", "window", "cu_seqlens")
        return {name: getattr(layer, name) for name in names}

    def roll(
        self, layer: LayerTrace, grad_o: Tensor | None, s: Tensor, roll: Tensor, normalize: bool
    ) -> Tensor:
        """The rollout step alone, (B, T, n)."""
        tensors = (roll, layer.q, layer.k, layer.v, layer.lse, grad_o, s)
        return relevance_rollout_step(*tensors, **self.seen(layer), normalize=normalize, backend=self.backend)

    def logit(self, x: Tensor, row: Tensor) -> Tensor:
        """Relevance of x (B, n, d) when one output <x, row> of each token has relevance 1; row (B, n, d)."""
        parts = (x * row).clamp_(min=0)
        return parts * safe_divide(torch.ones_like(parts[..., :1]), parts.sum(-1, keepdim=True))


class LrpRules(Rules):
    """The LRP baseline of the published code (its layers_lrp): positive and negative inputs each get the
    whole relevance of a Linear's output, residual sums are not rescaled, so relevance is not conserved.
    """

    rescale = False

    def linear(self, r: Tensor, module: nn.Linear, given: Tensor, returned: Tensor) -> Tensor:
        r, weight = r.to(given.device), module.weight.detach().to(given.dtype)
        out = torch.zeros_like(given)
        for bound in ({"min": 0}, {"max": 0}):
            x, w = given.clamp(**bound), weight.clamp(**bound)
            out += x * (safe_divide(r, x @ w.T) @ w)
        return out

    def logit(self, x: Tensor, row: Tensor) -> Tensor:
        one = torch.ones_like(x[..., :1])
        out = torch.zeros_like(x)
        for bound in ({"min": 0}, {"max": 0}):
            parts = x.clamp(**bound) * row.clamp(**bound)
            out += parts * safe_divide(one, parts.sum(-1, keepdim=True))
        return out
