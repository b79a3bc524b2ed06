"""The relevance rules with their options, over the ops; and the same steps under the LRP baseline's rules."""

import torch
from torch import Tensor, nn

from pyglobenc.hf import LayerTrace
from pyglobenc.methods.forward_error import LayerError
from pyglobenc.methods.relevance_error import Quotient, Relevance, added_error, cloned, projected_error, quotient_error, token_error
from pyglobenc.methods.weight_cache import WeightCache
from pyglobenc.ops import add_relevance, clone_relevance, linear_relevance, relevance_attention, relevance_rollout_step
from pyglobenc.reference.relevance_attention import relevance_attention as reference_attention
from pyglobenc.reference.safe_division import safe_divide


class Rules:
    """Deep Taylor rules of Chefer et al., 2021, for one call.

    Args:
        backend: "auto" or a backend's name.
        stabilizer: of the divisions by sums of both signs (residual sum, attention output, scores): 0 for the published guard, e > 0
            for a sign-aware one.
    """

    rescale = True  # residual sums keep each branch's share of the total

    def __init__(self, backend: str, stabilizer: float = 0.0):
        self.backend = backend
        self.stabilizer = stabilizer
        self.weights = WeightCache()

    def linear(self, r: Relevance, module: nn.Linear, given: Tensor, returned: Tensor) -> Relevance:
        """Relevance (B, n, d_in) of a Linear's input from that of its output (B, n, d_out)."""
        bias = None if module.bias is None else module.bias.detach()
        weight, absolute = module.weight.detach(), self.weights.absolute(module, r.values.dtype)
        out = linear_relevance(r.values, given, weight, abs_weight=absolute, output=returned, bias=bias, backend=self.backend)
        return Relevance(out, token_error(r))

    def token_sum(self, r: Relevance, x: Tensor, weights: Tensor) -> Relevance:
        """Relevance of tokens x (B, n, d) from that of their sum with weights (B, n), r (B, 1, d): the rule of a Linear whose weights
        are positive. A sum of one token with weight 1 is the token itself."""
        parts = x.clamp(min=0) * weights[..., None]
        out = parts * safe_divide(r.values, parts.sum(1, keepdim=True))
        alone = (weights == 1).any(1) & (weights.count_nonzero(1) == 1)
        return Relevance(torch.where(alone[:, None, None], r.values * weights[..., None], out))

    def add(
        self, r: Relevance, a: Tensor, b: Tensor, by_sum: Tensor | None = None, offsets: Tensor | None = None
    ) -> tuple[Relevance, Relevance]:
        """Relevance of both branches of a residual sum, (B, n, d); by_sum: squared relative error of a division by a + b."""
        options = dict(stabilizer=self.stabilizer, rescale=self.rescale, offsets=offsets, backend=self.backend)
        branches = add_relevance(r.values, a, b, **options)
        error = None if by_sum is None else added_error(r, by_sum, branches if self.rescale else None, self.weights)
        return tuple(Relevance(t, error) for t in branches)

    def clone(self, parts: list[Relevance], x: Tensor) -> Relevance:
        """Relevance of a tensor read by several branches, (B, n, d)."""
        return cloned(parts, clone_relevance([part.values for part in parts], x, backend=self.backend))

    def over_output(self, r_o: Relevance, o: Tensor, at_o: Tensor | None = None) -> Quotient:
        """s = R_o / safe(o) by head, (B, H, n, dh), from relevance (B, n, d); at_o: squared error of o, (B, H, 1, dh)."""
        s = safe_divide(r_o.values.unflatten(2, (o.shape[1], -1)).transpose(1, 2), o, self.stabilizer)
        return Quotient(s) if at_o is None else quotient_error(r_o, s, o, at_o, self.weights)

    def attention(
        self, layer: LayerTrace, grad_o: Tensor | None, s: Quotient, roll: Tensor | None, normalize: bool, errors: LayerError | None
    ) -> tuple:
        """Relevance of queries, keys and values, (B, n, d) each, and the stepped rollout (B, T, n) or None."""
        *parts, _, rolled = self._attention(layer, grad_o, s.values, roll, normalize)
        at_parts = (None,) * 3 if errors is None else projected_error(layer, errors, s, parts, self.weights)
        parts = [Relevance(t.transpose(1, 2).flatten(2), error) for t, error in zip(parts, at_parts, strict=True)]
        return parts, rolled

    def _attention(self, layer: LayerTrace, grad_o: Tensor | None, s: Tensor, roll: Tensor | None, normalize: bool) -> tuple:
        return relevance_attention(
            layer.q,
            layer.k,
            layer.v,
            layer.lse,
            grad_o,
            s,
            r=roll,
            key_mask=layer.key_mask,
            scaling=layer.scaling,
            window=layer.window,
            additive_mask=not layer.modules.pre_norm,
            normalize=normalize,
            stabilizer=self.stabilizer,
            offsets=layer.offsets,
            backend=self.backend,
        )

    def roll(self, layer: LayerTrace, grad_o: Tensor | None, s: Tensor, roll: Tensor, normalize: bool) -> Tensor:
        """The rollout step alone, (B, T, n)."""
        return relevance_rollout_step(
            roll,
            layer.q,
            layer.k,
            layer.v,
            layer.lse,
            grad_o,
            s,
            key_mask=layer.key_mask,
            scaling=layer.scaling,
            window=layer.window,
            normalize=normalize,
            offsets=layer.offsets,
            backend=self.backend,
        )

    def logit(self, x: Tensor, row: Tensor) -> Tensor:
        """Relevance of x (B, n, d) when one output <x, row> of each token has relevance 1; row (B, n, d)."""
        parts = (x * row).clamp_(min=0)
        return parts * safe_divide(torch.ones_like(parts[..., :1]), parts.sum(-1, keepdim=True))


class LrpRules(Rules):
    """The LRP baseline of the published code (its layers_lrp): positive and negative inputs each get the whole relevance of a Linear's
    output, residual sums are not rescaled, so relevance is not conserved."""

    rescale = False

    def linear(self, r: Relevance, module: nn.Linear, given: Tensor, returned: Tensor) -> Relevance:
        weight = module.weight.detach().to(given.dtype)
        out = torch.zeros_like(given)
        for bound in ({"min": 0}, {"max": 0}):
            x, w = given.clamp(**bound), weight.clamp(**bound)
            out += x * (safe_divide(r.values, x @ w.T) @ w)
        return Relevance(out, token_error(r))

    def _attention(self, layer: LayerTrace, grad_o: Tensor | None, s: Tensor, roll: Tensor | None, normalize: bool) -> tuple:
        return reference_attention(
            layer.q,
            layer.k,
            layer.v,
            layer.lse,
            grad_o,
            s,
            roll,
            layer.key_mask,
            layer.scaling,
            layer.window,
            not layer.modules.pre_norm,
            normalize,
            self.stabilizer,
            layer.offsets,
            rescale=False,
        )

    def logit(self, x: Tensor, row: Tensor) -> Tensor:
        one = torch.ones_like(x[..., :1])
        out = torch.zeros_like(x)
        for bound in ({"min": 0}, {"max": 0}):
            parts = x.clamp(**bound) * row.clamp(**bound)
            out += parts * safe_divide(one, parts.sum(-1, keepdim=True))
        return out
