"""The modules of one layer, and the tensors that one forward pass computed in them."""

from collections import Counter
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyglobenc.backends.shared.score_mods import ScoreMod
from pyglobenc.hf.trace.norms import NormParts, is_stock, norm_parts
from pyglobenc.hf.trace.projections import Directions, Projection, project
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


class NormStats:
    """Statistics of one norm in the forward pass, float32 or float64.

    Attributes:
        mean: (B, n); None for an RMSNorm.
        rstd: (B, n), the reciprocal standard deviation, including eps.
    """

    def __init__(self, mean: Tensor | None, rstd: Tensor):
        """Take the statistics as norms return them, (B, n, 1)."""
        self._mean, self._rstd = mean, rstd

    # Views are made on demand, because creating all four for a layer costs as much as one kernel launch.
    @property
    def mean(self) -> Tensor | None:
        return None if self._mean is None else _by_token(self._mean)

    @property
    def rstd(self) -> Tensor:
        return _by_token(self._rstd)

    def followed_by(self, more: "NormStats") -> "NormStats":
        """Return the statistics of these tokens, followed by those of the tokens in `more`."""
        pairs = ((self._mean, more._mean), (self._rstd, more._rstd))
        return NormStats(*(None if t is None else torch.cat([t, other], 1) for t, other in pairs))


def _by_token(t: Tensor) -> Tensor:
    t = t.squeeze(-1)
    return t.detach() if t.requires_grad else t


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
    calls: Counter[str] = field(default_factory=Counter)  # number of calls, by field name of LayerModules

    def add_stats(self, part: str, stats: NormStats) -> None:
        """Keep a norm's statistics; those of a second call are appended to those of the first."""
        before = self.norms.get(part)
        self.norms[part] = stats if before is None else before.followed_by(stats)

    def project(self, t: Tensor, **options: Any) -> Projection:
        """Project a tensor (B, n, d) on the direction of the checks, with the options of `project`."""
        return project(t, self.directions, **options)

    def keep(self, name: str, t: Tensor, **options: Any) -> None:
        """Keep a tensor's projection; that of a second call is appended to that of the first."""
        before, new = self.projections.get(name), self.project(t, **options)
        self.projections[name] = new if before is None else before.followed_by(new)

    @property
    def in_half(self) -> bool:
        """Tell whether the forward pass computed a part of the layer's hidden states in half precision."""
        return any(p.eps > torch.finfo(torch.float32).eps for p in self.projections.values())

    @property
    def output_weight(self) -> Tensor:
        """Return W_O by head, (H, dh, d)."""
        heads = (self.q.shape[1], self.q.shape[3])
        return dense_weight(self.modules.output, heads[0] * heads[1]).unflatten(0, heads)

    def norm_parts(self, name: str) -> NormParts:
        """Return weight, bias and eps of a layer norm, given its field name in LayerModules."""
        norm = getattr(self.modules, name)
        return norm_parts(norm, self.x.shape[2]) if is_stock(norm) else self.parts[name]

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
        found.extend(inner for inner in module._modules.values() if inner is not None and inner not in blocks)
    return found
