"""The relevance rules with their options, over the ops; and the same steps under the LRP baseline's rules."""

import torch
from torch import Tensor, nn

from pyglobenc.hf import LayerTrace
from pyglobenc.methods.reliability import Relevance, division_noise, score_noise, squared_norm
from pyglobenc.ops import add_relevance, clone_relevance, linear_relevance, relevance_attention, relevance_rollout_step
from pyglobenc.reference.relevance_attention import relevance_attention as reference_attention
from pyglobenc.reference.safe_division import safe_divide


class WeightCache:
    """|W| of a model's Linear modules, kept until the weights change; not kept where it has to be widened."""

    def __init__(self):
        self._kept: dict[nn.Module, tuple[tuple, Tensor]] = {}

    def absolute(self, module: nn.Linear, dtype: torch.dtype) -> Tensor | None:
        """|W| (d_out, d_in), or None when the weights have another dtype."""
        weight = module.weight.detach()
        if weight.dtype != dtype:
            return None
        version = (weight.data_ptr(), weight._version)
        if module not in self._kept or self._kept[module][0] != version:
            self._kept[module] = (version, weight.abs())
        return self._kept[module][1]


class Rules:
    """Deep Taylor rules of Chefer et al., 2021.

    Args:
        backend: "auto" or a backend's name.
        stabilizer: of the divisions by sums of both signs (residual sum, attention output, scores): 0 for the published guard, e > 0
            for a sign-aware one.
    """

    rescale = True  # residual sums keep each branch's share of the total

    def __init__(self, backend: str, stabilizer: float = 0.0):
        self.backend = backend
        self.stabilizer = stabilizer
        self.level = 1  # layers above the input, whose errors a division finds in its divisor
        self.weights = WeightCache()

    def linear(self, r: Relevance, module: nn.Linear, given: Tensor, returned: Tensor) -> Relevance:
        """Relevance (B, n, d_in) of a Linear's input from that of its output (B, n, d_out)."""
        bias = None if module.bias is None else module.bias.detach()
        weight, absolute = module.weight.detach(), self.weights.absolute(module, r.values.dtype)
        return r.like(linear_relevance(r.values, given, weight, abs_weight=absolute, output=returned, bias=bias, backend=self.backend))

    def add(self, r: Relevance, a: Tensor, b: Tensor) -> tuple[Relevance, Relevance]:
        """Relevance of both branches of a residual sum, (B, n, d)."""
        branches = add_relevance(r.values, a, b, stabilizer=self.stabilizer, rescale=self.rescale, backend=self.backend)
        inherited, z = r.relative(), a + b
        return tuple(Relevance(t, inherited * squared_norm(t) + self.level * division_noise(t, z, a, b)) for t in branches)

    def clone(self, parts: list[Relevance], x: Tensor) -> Relevance:
        """Relevance of a tensor read by several branches, (B, n, d)."""
        return Relevance(clone_relevance([part.values for part in parts], x, backend=self.backend), sum(part.noise for part in parts))

    def over_output(self, r_o: Relevance, o: Tensor) -> Relevance:
        """s = R_o / safe(o) by head, (B, H, n, dh), from relevance (B, n, d)."""
        s = safe_divide(r_o.values.unflatten(2, (o.shape[1], -1)).transpose(1, 2), o, self.stabilizer)
        return Relevance(s, r_o.relative() * squared_norm(s) + self.level * division_noise(s, o, o))

    def attention(self, layer: LayerTrace, grad_o: Tensor | None, s: Relevance, roll: Tensor | None, normalize: bool) -> tuple:
        """Relevance of queries, keys and values, (B, n, d) each, and the stepped rollout (B, T, n) or None."""
        *parts, _, rolled = self._attention(layer, grad_o, s.values, roll, normalize)
        own = self.level * score_noise(layer, s.values, parts[0])
        inherited = s.relative()
        parts = [Relevance(t.transpose(1, 2).flatten(2), inherited * squared_norm(t)) for t in parts]
        for part in parts[:2]:
            part.noise += own
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
        return r.like(out)

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
            rescale=False,
        )

    def logit(self, x: Tensor, row: Tensor) -> Tensor:
        one = torch.ones_like(x[..., :1])
        out = torch.zeros_like(x)
        for bound in ({"min": 0}, {"max": 0}):
            parts = x.clamp(**bound) * row.clamp(**bound)
            out += parts * safe_divide(one, parts.sum(-1, keepdim=True))
        return out
