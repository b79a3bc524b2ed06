"""The modules of one layer, and the tensors that one forward pass computed in them."""

from collections import defaultdict
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyglobenc.backends.shared.score_mods import ScoreMod
from pyglobenc.hf.trace.norms import NormParts, norm_parts
from pyglobenc.hf.trace.projections import Directions, Projection, wide
from pyglobenc.hf.weights import dense_weight


@dataclass(frozen=True)
class OwnScores:
    """How an attention module that computes its scores itself changes the products q . k."""

    scaling: float
    score_mod: ScoreMod | None  # changes the scaled scores before the softmax
    key_mask: Tensor | None  # (B, n) bool


class LayerModules(NamedTuple):
    """The modules of one transformer layer, by the part they play; None for a part without its own module."""

    block: nn.Module  # called with the layer's input x
    attention: nn.Module  # the module that transformers hands to the attention function
    output: nn.Module  # W_O
    attention_norm: nn.Module  # post-norm: after the attention's residual sum; pre-norm: before the attention
    mlp_output: nn.Module  # last Linear of the MLP
    output_norm: nn.Module  # post-norm: after the MLP's residual sum; pre-norm: before the MLP
    query: nn.Module | None = None  # None: one module computes query, key and value
    key: nn.Module | None = None
    value: nn.Module | None = None
    intermediate: nn.Module | None = None  # first Linear of the MLP; None: a gated MLP
    pre_norm: bool = False
    # module and name of a parameter (d,) that multiplies the attention's output before the residual sum
    scale: tuple[nn.Module, str] | None = None
    added_norm: nn.Module | None = None  # RMSNorm of the attention's output before the residual sum
    unit_offset: bool = False  # added_norm multiplies by 1 + its weight
    # for attention that ignores transformers' interface; called with the module and its arguments by name
    own_scores: Callable[[nn.Module, dict[str, Any]], OwnScores] | None = None

    def rounded(self) -> list[nn.Module]:
        """Return the layer's modules that round their output, (B, n, features) each."""
        parts = (self.query, self.key, self.value, self.output, self.mlp_output)
        return [module for module in parts if module is not None]


def part(module: nn.Module, path: str) -> nn.Module:
    """Return the module at a path such as "attention.output" inside a module.

    Reading `_modules` is ten times faster than a module's attribute, which is noticeable for a short text. No
    tensor is read.

    Raises:
        AttributeError: there is none.
    """
    for name in path.split("."):
        inner = module._modules.get(name)
        module = getattr(module, name) if inner is None else inner
    return module


class NormStats(NamedTuple):
    """Statistics of one norm in the forward pass, float32 or float64, outside the autograd graph."""

    mean: Tensor | None  # (B, n); None for an RMSNorm
    rstd: Tensor  # (B, n), the reciprocal standard deviation, including eps

    @classmethod
    def of(cls, mean: Tensor | None, rstd: Tensor) -> "NormStats":
        """Take the statistics as norms return them, (B, n, 1)."""
        return cls(None if mean is None else wide(mean).squeeze(-1), wide(rstd).squeeze(-1))

    def followed_by(self, more: "NormStats") -> "NormStats":
        """Return the statistics of these tokens, followed by those of the tokens in `more`."""
        pairs = zip(self, more, strict=True)
        return NormStats(*(None if t is None else torch.cat([t, other], 1) for t, other in pairs))


@dataclass
class LayerTrace:
    """The tensors of one layer in the last forward pass; n includes padding."""

    modules: LayerModules
    x: Tensor | None = None  # (B, n, d), the layer's input
    q: Tensor | None = None  # (B, H, n, dh), after rotary embedding
    k: Tensor | None = None  # (B, Hkv, n, dh)
    v: Tensor | None = None  # (B, Hkv, n, dh)
    o: Tensor | None = None  # (B, H, n, dh), attention output by head
    lse: Tensor | None = None  # (B, H, n), of the scaled scores; inf where a padded query sees no key
    scaling: float = 1.0
    key_mask: Tensor | None = None  # (B, n) bool, True for real tokens; None: no padding
    window: tuple[int, int] = (-1, -1)  # query i sees keys i - left to i + right; -1: no limit
    score_mod: ScoreMod | None = None  # changes the scaled scores before the softmax
    cu_seqlens: Tensor | None = None  # (S + 1,) int32, on the CPU: where each packed sequence starts
    norms: dict[str, NormStats] = field(default_factory=dict)  # by field name of LayerModules
    parts: dict[str, NormParts] = field(default_factory=dict)  # the same, for norms that aren't torch's own
    # `pyglobenc.hf.trace.checks` compares these projections; all layers share the directions.
    projections: dict[str, Projection] = field(default_factory=dict)
    # torch's counts of the writes to q, k, v and o when they were kept; none in inference mode
    writes: dict[str, int] = field(default_factory=dict)
    directions: Directions = field(default_factory=Directions)
    # number of calls, by field name of LayerModules
    calls: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add_stats(self, part: str, stats: NormStats) -> None:
        """Keep a norm's statistics; those of a second call are appended to those of the first."""
        before = self.norms.get(part)
        self.norms[part] = stats if before is None else before.followed_by(stats)

    def keep(self, name: str, t: Tensor, length: bool = False, weight: Tensor | None = None) -> None:
        """Keep a tensor's projection; that of a second call is appended to that of the first.

        Args:
            name: name of the projection.
            t, length, weight: as for `Directions.project`.
        """
        before, new = self.projections.get(name), self.directions.project(t, length, weight)
        self.projections[name] = new if before is None else before.followed_by(new)

    @property
    def in_half(self) -> bool:
        """Tell whether the forward pass computed a part of the hidden states in half precision."""
        return self.directions.eps > torch.finfo(torch.float32).eps

    @property
    def output_weight(self) -> Tensor:
        """Return W_O by head, (H, dh, d)."""
        heads = (self.q.shape[1], self.q.shape[3])
        return dense_weight(self.modules.output, heads[0] * heads[1]).view(*heads, -1)

    def norm_parts(self, name: str) -> NormParts:
        """Return weight, bias and eps of a layer norm, given its field name in LayerModules."""
        parts = self.parts.get(name)
        return norm_parts(getattr(self.modules, name), self.x.shape[2]) if parts is None else parts

    def norm_weight(self, name: str) -> Tensor:
        """Return the weight of a layer norm, (d,); ones if it has none."""
        weight = self.norm_parts(name).weight
        return self.x.new_ones(self.x.shape[2]).detach() if weight is None else weight


def outside(model: nn.Module, blocks: Container[nn.Module]) -> list[nn.Module]:
    """Return the model and all modules in it, except the blocks and the modules inside them.

    `model.modules()` would spend most of its time inside the blocks. No tensor is read.
    """
    found = [model]
    for module in found:
        for inner in module._modules.values():
            if inner is not None and inner not in blocks:
                found.append(inner)
    return found
