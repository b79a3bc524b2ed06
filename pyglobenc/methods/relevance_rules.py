"""The relevance rules with their options, over the ops; and the same steps under the LRP baseline's rules."""

import torch
from torch import Tensor, nn

from pyglobenc.hf import LayerTrace
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

    def __init__(self, backend: str, stabilizer: float = 0.0):
        self.backend = backend
        self.stabilizer = stabilizer
        self.weights = WeightCache()

    def linear(self, r: Tensor, module: nn.Linear, given: Tensor, returned: Tensor) -> Tensor:
        """Relevance (B, n, d_in) of a Linear's input from that of its output (B, n, d_out)."""
        bias = None if module.bias is None else module.bias.detach()
        absolute = self.weights.absolute(module, r.dtype)
        return linear_relevance(
            r, given, module.weight.detach(), abs_weight=absolute, output=returned, bias=bias, backend=self.backend
        )

    def add(self, r: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Relevance of both branches of a residual sum, (B, n, d)."""
        return add_relevance(r, a, b, stabilizer=self.stabilizer, backend=self.backend)

    def clone(self, parts: list[Tensor], x: Tensor) -> Tensor:
        """Relevance of a tensor read by several branches, (B, n, d)."""
        return clone_relevance(parts, x, backend=self.backend)

    def over_output(self, r_o: Tensor, o: Tensor) -> Tensor:
        """s = R_o / safe(o), (B, H, n, dh)."""
        return safe_divide(r_o, o, self.stabilizer)

    def attention(self, layer: LayerTrace, grad_o: Tensor | None, s: Tensor, roll: Tensor | None, normalize: bool) -> tuple:
        """R_q, R_k, R_v (B, H, n, dh), row sums (B, n) and the stepped rollout (B, T, n) or None."""
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
        """Relevance of x (B, d) when one output <x, row> has relevance 1; row (B, d)."""
        parts = (x * row).clamp_(min=0)
        return parts * safe_divide(torch.ones_like(parts[:, :1]), parts.sum(-1, keepdim=True))


class LrpRules(Rules):
    """The LRP baseline of the published code (its layers_lrp): positive and negative inputs each get the whole relevance of a Linear's
    output, residual sums are not rescaled, so relevance is not conserved."""

    def linear(self, r: Tensor, module: nn.Linear, given: Tensor, returned: Tensor) -> Tensor:
        weight = module.weight.detach().to(r.dtype)
        out = torch.zeros_like(given)
        for bound in ({"min": 0}, {"max": 0}):
            x, w = given.clamp(**bound), weight.clamp(**bound)
            out += x * (safe_divide(r, x @ w.T) @ w)
        return out

    def add(self, r: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return add_relevance(r, a, b, stabilizer=self.stabilizer, rescale=False, backend=self.backend)

    def attention(self, layer: LayerTrace, grad_o: Tensor | None, s: Tensor, roll: Tensor | None, normalize: bool) -> tuple:
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
        one = torch.ones_like(x[:, :1])
        out = torch.zeros_like(x)
        for bound in ({"min": 0}, {"max": 0}):
            parts = x.clamp(**bound) * row.clamp(**bound)
            out += parts * safe_divide(one, parts.sum(-1, keepdim=True))
        return out
