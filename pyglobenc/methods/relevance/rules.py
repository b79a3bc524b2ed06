"""The relevance rules of transformer attribution, which call the ops, and the LRP baseline's rules."""

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
    """The deep Taylor rules of Chefer et al., 2021, for one call.

    Args:
        backend: "auto" or a backend's name.
        stabilizer: guard of the divisions by sums of both signs: the residual sum, the attention output and
            the scores. 0 is the published guard, and e > 0 a sign-aware one.
    """

    # Each branch of a residual sum is rescaled to its share of the total relevance.
    rescale = True

    def __init__(self, backend: str, stabilizer: float = 0.0):
        self.backend = backend
        self.stabilizer = stabilizer
        self._memory: Tensor | None = None

    def linear(self, r: Tensor, module: nn.Linear, given: Tensor, returned: Tensor) -> Tensor:
        """Return the relevance (B, n, d_in) of a Linear's input, from that of its output (B, n, d_out)."""
        r, bias = r.to(given.device), None if module.bias is None else module.bias.detach()
        weight, absolute = module.weight.detach(), self._absolute(module.weight.detach(), r.dtype)
        return linear_relevance(
            r, given, weight, abs_weight=absolute, output=returned, bias=bias, backend=self.backend
        )

    def _absolute(self, weight: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Return |W| (d_out, d_in), valid until the next call; None if the weight has another dtype.

        All modules share one piece of memory. Allocating it for each module took 8 % of a call of BERT-base
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
        """Return the relevance (B, n, d) of tokens x, from that of their weighted sum, r (B, 1, d).

        This is the rule of a Linear module with positive weights (B, n). A sum of one token with weight 1 is
        that token, and passes the relevance on unchanged.
        """
        r, parts = r.to(x.device), x.clamp(min=0) * weights[..., None]
        out = parts * safe_divide(r, parts.sum(1, keepdim=True))
        alone = (weights == 1).any(1) & (weights.count_nonzero(1) == 1)
        return torch.where(alone[:, None, None], r * weights[..., None], out)

    def add(self, r: Tensor, a: Tensor, b: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the relevance of both branches of a residual sum a + b, (B, n, d) each."""
        options = dict(
            stabilizer=self.stabilizer, rescale=self.rescale, cu_seqlens=cu_seqlens, backend=self.backend
        )
        return add_relevance(r.to(a.device), a, b, **options)

    def clone(self, parts: list[Tensor], x: Tensor) -> Tensor:
        """Return the relevance of a tensor x that several branches read, (B, n, d)."""
        return clone_relevance(parts, x, backend=self.backend)

    def total(self, parts: list[Tensor]) -> Tensor:
        """Return the relevance of a tensor read by modules that are one module in the published code."""
        return sum(parts)

    def over_output(self, r_o: Tensor, layer: LayerTrace) -> Tensor:
        """Return s = R_o / safe(o), (B, H, n, dh), from the attention output's relevance R_o (B, n, d)."""
        return safe_divide(r_o.unflatten(2, (layer.o.shape[1], -1)).transpose(1, 2), layer.o, self.stabilizer)

    def attention(
        self, layer: LayerTrace, grad_o: Tensor | None, s: Tensor, roll: Tensor | None, normalize: bool
    ) -> tuple[list[Tensor], Tensor | None]:
        """Propagate relevance through a layer's attention, and take a rollout step.

        Args:
            layer: the captured layer.
            grad_o: gradient of the logit with respect to the attention output, (B, H, n, dh), or None.
            s: relevance of the attention output over safe(that output), (B, H, n, dh).
            roll: rows of the rollout of the layers above, (B, T, n), or None.
            normalize: divide the rows of I + A by their sums.

        Returns:
            Relevance of the queries, keys and values, (B, n, d) each, and the rows of the rollout (B, T, n)
            after this layer, or None without roll.
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
        """Return the arguments of the ops that say which keys a query sees, and how scores are scaled."""
        names = ("key_mask", "scaling", "window", "cu_seqlens")
        return {name: getattr(layer, name) for name in names}

    def roll(
        self, layer: LayerTrace, grad_o: Tensor | None, s: Tensor, roll: Tensor, normalize: bool
    ) -> Tensor:
        """Return the rollout rows (B, T, n) after this layer, without the relevance."""
        tensors = (roll, layer.q, layer.k, layer.v, layer.lse, grad_o, s)
        return relevance_rollout_step(*tensors, **self.seen(layer), normalize=normalize, backend=self.backend)

    def logit(self, x: Tensor, row: Tensor) -> Tensor:
        """Return the relevance of x (B, n, d), if each token's output <x, row> has relevance 1."""
        parts = (x * row).clamp_(min=0)
        return parts * safe_divide(torch.ones_like(parts[..., :1]), parts.sum(-1, keepdim=True))


class LrpRules(Rules):
    """The rules of the published code's LRP baseline (its layers_lrp).

    Positive and negative inputs of a Linear module each get the whole relevance of its output, and residual
    sums are not rescaled. So relevance is not conserved.
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
