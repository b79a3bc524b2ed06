"""Information flow routes: how much each token's vectors make up the states of a span of tokens.

In layer l, let y = sum_i u_i z_i be the residual stream of the span after the attention, with z_i = x_i plus
the attention's output, and weights u_i of the span's tokens that sum to 1. Its parts are the residual
sum_i u_i x_i, and for each head h and key j the vector w[h, j] f[h, j], where f[h, j] = v[h, j] W_O[h] and
w[h, j] = sum_i u_i alpha[h, i, j]. The proximity of a part p to their sum y, in L1 (Ferrando and Voita,
2024), is

    prox(p, y) = max(0, |y|_1 - |y - p|_1)

The layer's score of token j is the sum of its heads' proximities, divided by the sum of the proximities of
all parts, the residual included. The score of a token is the sum over the layers. This is what FlashTrace
computes for a span. The weights of a single token give the edges of information flow routes that enter it.

The MLP mixes no tokens, so its edge changes no score. No edge is dropped (the threshold of the paper is 0).
The vectors include the bias of the values, and y includes the bias of W_O. What an architecture applies to
the attention's output before it adds it, a layer scale or a norm, is part of f and w.

The papers define the flow for pre-norm decoders. Bidirectional attention and sliding windows change nothing.
In a post-norm layer, y is the sum before the LayerNorm, which extends the papers.

One layer takes s*n*d multiply-adds for w with a span of s tokens, and n*d^2 for the vectors, whose
differences are never stored. There is no (n, n) array.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyglobenc.backends.shared.masks import visible_keys
from pyglobenc.backends.shared.proximity_tiles import nearer
from pyglobenc.backends.shared.relevance_tiles import MIN_QUERIES, TILE_FLOATS
from pyglobenc.common.arguments import known_arguments
from pyglobenc.common.autocast import outside_autocast
from pyglobenc.common.deferred import require
from pyglobenc.hf import LayerTrace
from pyglobenc.methods.arguments import model_inputs
from pyglobenc.methods.inputs import check_model, require_finite, run_captured
from pyglobenc.methods.rollout.rows import unknown_error
from pyglobenc.methods.rollout.stages import StageOps
from pyglobenc.methods.target_tokens import target_rows
from pyglobenc.ops import proximity

WHO = "InformationFlow"
# Start and stop of a range of positions: one pair for all examples, or (B, 2).
Span = Sequence[int] | Sequence[Sequence[int]] | Tensor


@dataclass
class FlowResult:
    """Scores of the tokens from which information flows to a span.

    Attributes:
        scores: (B, n), sum over the layers of each token's share; 0 at padding. With hops it is the sum of
            all passes, each times its entry of `ratios` before it, at the tokens outside both spans that
            stand before the end of the reasoning span; the other tokens get 0.
        pass_scores: (B, hops + 1, n), the scores of each pass: of the target span, then of each hop.
        ratios: (B, hops + 1), the part of all scores that lies in the reasoning span, multiplied over the
            passes.
        layer_scores: (B, L, n), each token's share in each layer, of the first pass.
        residual: (B, L), the share of the residual in each layer. With layer_scores it sums to 1.
        head_scores: (B, L, H), the share of each head in each layer, of the first pass.
        targets: (B,) int64, position of the token explained; None for a span or a mean of tokens.
        output: the output of the model.
        error: (B,), NaN after a forward pass in half precision, whose error is unknown; otherwise None.
    """

    scores: Tensor
    pass_scores: Tensor
    ratios: Tensor
    layer_scores: Tensor
    residual: Tensor
    head_scores: Tensor
    targets: Tensor | None = None
    output: Any = None
    error: Tensor | None = None


class InformationFlow:
    """Information flow routes to a span of tokens (Ferrando and Voita, 2024), with FlashTrace's hops.

    Args:
        model: a model of a known architecture, or a user's module with a head of its own around one, in
            evaluation mode. It is not changed.
        backend: "auto", "reference", "cpu", "triton" or "cuda".
        dtype: dtype of the attribution arithmetic. None means float32, or float64 for a float64 model.

    Raises:
        TypeError, ValueError: an unknown architecture or backend, or a model in training mode.
    """

    @known_arguments
    def __init__(self, model: nn.Module, backend: str = "auto", dtype: torch.dtype | None = None):
        self.model = check_model(WHO, model, backend, dtype)
        self.dtype = dtype
        self.ops = StageOps(backend)

    @outside_autocast
    @torch.no_grad()
    def __call__(
        self,
        *,
        target_span: Span | str | None = None,
        reasoning_span: Span | None = None,
        hops: int | None = None,
        **batch: Any,
    ) -> FlowResult:
        """Attribute the hidden states of a span of tokens to the input tokens.

        The first pass explains the target span, whose tokens all have the same weight. Each hop then explains
        the reasoning span, whose tokens have the scores of the pass before as weights.

        Args:
            target_span: (start, stop), the positions start to stop - 1 of the batch's rows, padding counted;
                or (B, 2). "mean" explains the mean of all real tokens. None is the default target of
                `GlobEnc`: for a language model the last real token.
            reasoning_span: the tokens through which the hops go, as target_span. None with hops above 0
                means the target span.
            hops: number of hops. None means 1 with a reasoning_span, and 0 without one.
            batch: the inputs of the model, as `GlobEnc` takes them.

        Returns:
            FlowResult with scores (B, n).

        Raises:
            TypeError, ValueError: as `GlobEnc`; or a span is empty, out of range or holds padding; or hops
                without a reasoning_span start from a mean of tokens.

        Source: Ferrando and Voita, 2024; FlashTrace (arXiv 2602.01914).
        """
        batch = model_inputs(WHO, self.model, batch, InformationFlow.__call__)
        hops = _checked_hops(hops, reasoning_span)
        named = target_span is None or isinstance(target_span, str)
        captured, output, read = run_captured(
            WHO, self.model, batch, self.dtype, target_span if named else ()
        )
        last = captured[-1]
        u, targets = self._target(target_span, last, read) if named else (None, None)
        target = u if named else span_weights(WHO, "target_span", target_span, last)
        if reasoning_span is not None:
            reasoning = span_weights(WHO, "reasoning_span", reasoning_span, last)
        elif hops and named and targets is None:
            raise ValueError(f"{WHO}: hops need a reasoning_span, because the target is a mean of tokens")
        else:
            reasoning = target
        result = self._passes(captured, target, reasoning, hops)
        require_finite(WHO, self.model, (result.scores, result.pass_scores))
        result.targets, result.output = targets, output
        result.error = unknown_error(WHO, captured, len(target), result.scores.device)
        return result

    @outside_autocast
    @torch.no_grad()
    def each(self, *, targets: Sequence[int] | Tensor, **batch: Any) -> list[FlowResult]:
        """Attribute each of T tokens to the input tokens, all from one forward pass.

        Args:
            targets: T positions for every example, or (B, T), as `GlobEnc` takes them.
            batch: as for a call.

        Returns:
            T results, each as a call gives it for this token as its target span.

        Raises:
            TypeError, ValueError: as `GlobEnc`.
        """
        batch = model_inputs(WHO, self.model, batch, InformationFlow.each)
        captured, output, _ = run_captured(WHO, self.model, batch, self.dtype, ())
        rows, results = target_rows(WHO, targets, captured[-1]), []
        error = unknown_error(WHO, captured, len(rows), rows.device)
        # The heads' proximities of this many tokens have at most as many entries as the queries.
        for some in rows.split(captured[-1].q.shape[3], dim=1):
            units = self._units(some, captured[-1])
            parts = self._shares(captured, units)
            for index, row in enumerate(some.unbind(1)):
                result = _first_pass([part[:, :, index] for part in parts], units[:, index] > 0)
                require_finite(WHO, self.model, (result.scores,))
                result.targets, result.output, result.error = row, output, error
                results.append(result)
        return results

    @staticmethod
    def _units(rows: Tensor, layer: LayerTrace) -> Tensor:
        """Return weights (B, S, n) float64 that are 1 at positions rows, (B, S)."""
        units = torch.zeros(*rows.shape, layer.q.shape[2], dtype=torch.float64, device=layer.q.device)
        return units.scatter_(2, rows[..., None], 1)

    def _target(
        self, name: str | None, layer: LayerTrace, read: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the weights (B, n) of a target without a span, and its position (B,) if it is one token."""
        rows = target_rows(WHO, name, layer, read)
        if rows.is_floating_point():
            return rows[:, 0], None
        return self._units(rows, layer)[:, 0], rows[:, 0]

    def _passes(self, captured: list[LayerTrace], target: Tensor, reasoning: Tensor, hops: int) -> FlowResult:
        """Return the result of all passes, for weights (B, n) of the two spans."""
        inside = reasoning > 0
        result = _first_pass([part[:, :, 0] for part in self._shares(captured, target[:, None])], inside)
        passes, ratios = [result.scores], [result.ratios[:, 0]]
        for _ in range(hops):
            weights = passes[-1].masked_fill(~inside, 0)
            weights = _share(weights, weights.sum(1, keepdim=True))
            passes.append(self._shares(captured, weights[:, None])[0][:, :, 0].sum(1))
            ratios.append(ratios[-1] * _part(passes[-1], inside))
        if hops:
            # A token after the reasoning span can't be the source of it.
            after = inside.flip(1).cumsum(1).flip(1) == 0
            factors = torch.stack([torch.ones_like(ratios[0]), *ratios[:-1]], 1)
            result.pass_scores, result.ratios = torch.stack(passes, 1), torch.stack(ratios, 1)
            scores = (result.pass_scores * factors[..., None]).sum(1)
            result.scores = scores.masked_fill(inside | (target > 0) | after, 0)
        return result

    def _shares(self, captured: list[LayerTrace], weights: Tensor) -> list[Tensor]:
        """Return the shares of the tokens (B, L, S, n), the residual (B, L, S) and the heads (B, L, S, H).

        weights (B, S, n) are those of the tokens of S spans.
        """
        parts = (self._layer(layer, weights) for layer in captured)
        return [torch.stack(part, 1) for part in zip(*parts, strict=True)]

    def _layer(self, layer: LayerTrace, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the shares of the tokens (B, S, n), the residual (B, S) and the heads (B, S, H) in S spans.

        weights (B, S, n) are those of the spans' tokens. The results are on the device of the weights.
        """
        dtype, device, n = self.ops.dtype_of(layer), layer.q.device, layer.q.shape[2]
        u = weights.to(device, dtype)
        used = (u != 0).any(1).any(0).nonzero()
        first, last = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
        rows, weight = slice(first, last), self.ops.output_weight(layer)
        kept, added, factors = self._sums(layer, u[..., rows], rows, weight)
        y = kept + added
        cols = visible_keys(rows, n, layer.window)
        w = self._span_attention(layer, factors, rows, cols)
        v = layer.v[:, :, cols].detach()
        prox = proximity(w, v, weight, y, per_head=True, backend=self.ops.backend)
        residual = nearer(kept, y).clamp(min=0)
        total = prox.sum((1, 3)) + residual
        tokens = torch.zeros_like(u)
        tokens[..., cols] = _share(prox.sum(1), total[..., None])
        heads = _share(prox.sum(3).transpose(1, 2), total[..., None])
        return tuple(share.to(weights.device) for share in (tokens, _share(residual, total), heads))

    def _sums(
        self, layer: LayerTrace, u: Tensor, rows: slice, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the spans' sums of x and of the attention's output, (B, S, d), and the factors of alpha.

        u are the weights of the m tokens of `rows`, (B, S, m), as the factors are. weight is W_O by head,
        (H, dh, d). An added norm scales each row of the attention's output.
        """
        x, o = layer.x[:, rows].detach().to(u.dtype), layer.o[:, :, rows].detach().to(u.dtype)
        factors = u
        if layer.modules.added_norm is not None:
            factors = u * layer.norms["added_norm"].rstd[:, None, rows].to(u.dtype)
        # A padded token may have any value, also infinity.
        out = (u == 0).all(1)[..., None]
        x, o = x.masked_fill(out, 0), o.transpose(1, 2).flatten(2).masked_fill(out, 0)
        factors = factors.masked_fill(u == 0, 0)
        added = factors @ o @ weight.flatten(0, 1)
        bias = self.ops.output_bias(layer)
        if bias is not None:
            added = added + factors.sum(2, keepdim=True) * bias
        return u @ x, added, factors

    def _span_attention(self, layer: LayerTrace, factors: Tensor, rows: slice, cols: slice) -> Tensor:
        """Return w, the sums of factors (B, S, m) times the rows of attention, (B, H, S, cols)."""
        batch, heads = layer.q.shape[:2]
        count = cols.stop - cols.start
        step = max(MIN_QUERIES, TILE_FLOATS // max(1, batch * heads * count))
        w = factors.new_zeros(batch, heads, factors.shape[1], count)
        for start in range(rows.start, rows.stop, step):
            part = slice(start, min(rows.stop, start + step))
            own = factors[:, None, :, start - rows.start : part.stop - rows.start]
            w += own @ self.ops.attention_tile(layer, part, cols)
        return w


def _first_pass(shares: list[Tensor], inside: Tensor) -> FlowResult:
    """Return the result of one pass, for the shares (B, L, n), (B, L) and (B, L, H) of its layers.

    inside (B, n) bool says which tokens belong to the reasoning span.
    """
    scores = shares[0].sum(1)
    return FlowResult(scores, scores[:, None], _part(scores, inside)[:, None], *shares)


def span_weights(who: str, name: str, span: Span, layer: LayerTrace) -> Tensor:
    """Check a span and return the weights of its tokens, (B, n) float64, 1 over their number.

    Args:
        who, name: names of the method and of the argument for errors.
        span: (start, stop) or (B, 2), with 0 <= start < stop <= n and no padding between them.
        layer: any captured layer, for B, n and the padding.

    Raises:
        TypeError, ValueError: the span is something else.
    """
    batch, _, n, _ = layer.q.shape
    try:
        ends = torch.as_tensor(span)
    except (RuntimeError, TypeError, ValueError) as error:
        raise TypeError(
            f"{who}: {name} must be (start, stop) or (B, 2), got {span!r:.80} ({error})"
        ) from error
    if ends.is_floating_point() or ends.is_complex() or ends.dtype == torch.bool:
        raise TypeError(f"{who}: {name} must hold integers, got {ends.dtype}")
    if tuple(ends.shape) not in ((2,), (batch, 2)):
        raise ValueError(
            f"{who}: {name} must be (start, stop) or (B, 2) with B={batch}, got shape {tuple(ends.shape)}"
        )
    ends = ends.to(layer.q.device).expand(batch, 2)
    start, stop = ends[:, :1], ends[:, 1:]
    require(
        ((start >= 0) & (start < stop) & (stop <= n)).all(),
        lambda: ValueError(
            f"{who}: {name} must have 0 <= start < stop <= {n}, the number of tokens, got {ends.tolist()}"
        ),
    )
    i = torch.arange(n, device=layer.q.device)
    inside = (i >= start) & (i < stop)
    if layer.key_mask is not None:
        require((layer.key_mask | ~inside).all(), lambda: ValueError(f"{who}: {name} holds a padding token"))
    return inside / inside.sum(1, keepdim=True, dtype=torch.float64)


def _checked_hops(hops: Any, reasoning_span: Span | None) -> int:
    if hops is None:
        return int(reasoning_span is not None)
    if isinstance(hops, bool) or not isinstance(hops, int):
        raise TypeError(f"{WHO}: hops must be an integer, got {hops!r}")
    if hops < 0:
        raise ValueError(f"{WHO}: hops must be at least 0, got {hops}")
    return hops


def _share(part: Tensor, total: Tensor) -> Tensor:
    """Return part / total, and 0 where the total is 0; the shapes broadcast."""
    return part / torch.where(total > 0, total, 1)


def _part(scores: Tensor, inside: Tensor) -> Tensor:
    """Return the share of the scores (B, n) that lies inside, (B,)."""
    return _share(scores.masked_fill(~inside, 0).sum(1), scores.sum(1))
