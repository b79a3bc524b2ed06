"""Gradient-weighted rollout of attention (Chefer, Gur and Wolf, ICCV 2021), for every known architecture.

    A = mean_h max(alpha * grad_alpha, 0),    R = (I + A_L) ... (I + A_1)

alpha are the attention probabilities and grad_alpha the gradient of the explained logit with respect to them
(eq. 5 and 6 of "Generic attention-model explainability", the rule of self-attention). The scores are the row
of R of the token that the head reads. The paper applies the rule to encoders; here it also stands for causal
masks, windows, grouped queries and soft caps, which it covers without change.

The method takes one forward and one backward pass, and one pass over the pairs. grad_alpha[i,j] is
<grad_o[i], v[j]>, so that no (n, n) array is stored.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyglobenc.backends.shared.packing import per_token, sequence_sums
from pyglobenc.backends.shared.score_mods import to_dtype
from pyglobenc.common.arguments import known_arguments
from pyglobenc.common.autocast import outside_autocast
from pyglobenc.hf import LayerTrace, find_layers
from pyglobenc.hf.limits import weights_named
from pyglobenc.methods.arguments import check_start_layer, model_inputs, packed_inputs
from pyglobenc.methods.differentiable import (
    Recorded,
    attention_gradients,
    real_keys,
    record_forward,
    recorded_target,
)
from pyglobenc.methods.head import detached, find_logits, tokens_read
from pyglobenc.methods.inputs import check_batch, check_model, require_finite
from pyglobenc.methods.packing import Packed, in_order, pack
from pyglobenc.methods.precision.reliability import examples_reordered, warn_of_nothing
from pyglobenc.methods.relevance.result import RelevanceResult, of_sequences
from pyglobenc.methods.target import Index
from pyglobenc.methods.target_tokens import unnamed_rows
from pyglobenc.ops import relevance_rollout_step

WHO = "GradientRollout"


class GradientRollout:
    """Gradient-weighted rollout of a model of any known architecture (Chefer et al., ICCV 2021).

    Args:
        model: a model with a head, or a user's module with a head of its own around one, in evaluation mode.
            It is not changed.
        backend: "auto", "reference", "cpu", "triton" or "cuda".
        dtype: dtype of the rollout's arithmetic. None means float32, or float64 for a float64 model. The
            model itself runs in its own dtype.

    Raises:
        TypeError, ValueError: an unknown architecture or backend, or a model in training mode.
    """

    @known_arguments
    def __init__(self, model: nn.Module, backend: str = "auto", dtype: torch.dtype | None = None):
        self.model = check_model(WHO, model, backend, dtype)
        self.depth = len(find_layers(self.model))
        self.backend, self.dtype = backend, dtype

    @known_arguments
    @outside_autocast
    def __call__(
        self,
        *,
        target: Any = None,
        contrast: Index = None,
        position: Index = None,
        start_layer: int = 0,
        **batch: Any,
    ) -> RelevanceResult:
        """Attribute one logit of each example to its tokens.

        Args:
            target, contrast, position: as for `TransformerAttribution`. The default position of a causal
                language model is the last real token, whose logits are those of the next token. A position
                (B, T) explains T logits of each example from one forward pass; target and contrast may then
                be (B, T) too.
            start_layer: the lowest layer of the rollout.
            batch: the model's inputs, as its tokenizer or image processor returns them: input_ids and
                attention_mask (B, n), or pixel_values (B, channels, height, width).

        Returns:
            RelevanceResult with scores (B, n), or (B, T, n) for T logits, whose other fields are (B, T). The
            scores are the row of R of the token that the head reads. For a head
            that reads a mean of tokens it is the mean of their rows, and for the heads of transformers that
            read otherwise it is the default row of `GlobEnc`. For images n counts the special tokens too.

        Raises:
            TypeError, ValueError: an index is out of range, the model can't take the input, the head reads
                tokens in unequal shares, or a score or a logit is not finite.
        """
        batch = model_inputs(WHO, self.model, batch, GradientRollout.__call__)
        check_start_layer(WHO, start_layer, self.depth)
        check_batch(WHO, self.model, batch)
        return self._attribute(batch, (target, contrast, position), start_layer)

    @known_arguments
    @outside_autocast
    def packed(
        self, *, target: Any = None, contrast: Index = None, start_layer: int = 0, **batch: Any
    ) -> list[RelevanceResult]:
        """Attribute one logit of each of S sequences, packed end to end so that there is no padding.

        Args:
            target, contrast: classes, one for all sequences or (S,).
            start_layer: as for a batch.
            batch: the model's inputs by name, each a list with one entry for each sequence.

        Returns:
            S results of batch size 1, with scores (1, n), in the order of the sequences. Each is what the
            sequence gives alone.

        Raises:
            TypeError, ValueError: as for a batch, or the model can't take packed sequences or has no single
                set of logits for a sequence.
        """
        batch = packed_inputs(WHO, batch, GradientRollout.packed)
        check_start_layer(WHO, start_layer, self.depth)
        with torch.inference_mode(False):
            packed = pack(WHO, self.model, batch)
        explained = (
            in_order(WHO, "target", target, packed.order),
            in_order(WHO, "contrast", contrast, packed.order),
            None,
        )
        with examples_reordered(packed.order):
            whole = self._attribute(packed, explained, start_layer)
        return of_sequences(whole, packed)

    def _attribute(
        self, batch: Mapping[str, Any] | Packed, explained: tuple[Any, Index, Index], start_layer: int
    ) -> RelevanceResult:
        with weights_named(self.model), torch.inference_mode(False), torch.enable_grad():
            run = record_forward(WHO, self.model, batch)
            chosen = recorded_target(WHO, run, batch, explained)
            several = chosen.logit.dim() == 2
            logits = list(chosen.logit.unbind(1)) if several else [chosen.logit]
        parts = []
        while logits:
            # The gradients of all layers exist for one logit at a time, on one graph.
            parts.append(self._row(run, logits.pop(0), start_layer, keep=bool(logits)))
        scores, nothing, position = (
            None if part[0] is None else torch.stack(part, 1) if several else part[0]
            for part in zip(*parts, strict=True)
        )
        logit = chosen.logit.detach()
        require_finite(WHO, self.model, (scores, logit))
        warn_of_nothing(WHO, nothing.any(1) if several else nothing)
        return RelevanceResult(scores, chosen.index, position, logit, nothing, output=detached(run.output))

    def _row(
        self, run: Recorded, logit: Tensor, start_layer: int, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the scores (B, n) of the logits (B,), where they are nothing (B,), and the rows' positions.

        `keep` keeps the graph for another logit.
        """
        layers = run.trace.layers
        cu_seqlens = layers[0].cu_seqlens
        with weights_named(self.model), torch.inference_mode(False), torch.enable_grad():
            rows = self._rows(run, logit)
            grads = attention_gradients(logit, run, start_layer, keep)
        with torch.no_grad():
            start = _unit_rows(rows, layers[-1], self._arithmetic(layers[-1]))
            row = self._roll_out(layers[start_layer:], grads[start_layer:], start)
            reached = (row != start)[:, 0]
            if cu_seqlens is None:
                nothing = ~reached.any(1)
                unreached = nothing[:, None]
            else:
                nothing = sequence_sums(reached.double(), cu_seqlens) == 0
                unreached = per_token(nothing[:, None], cu_seqlens)[:, 0]
            return row[:, 0].masked_fill(unreached, 0), nothing, _positions(rows, cu_seqlens)

    def _rows(self, run: Recorded, logit: Tensor) -> Tensor:
        """Return the rows of R that the head reads, as `unnamed_rows` returns them."""
        logits = find_logits(run.output)
        # One logit of a token is followed alone, since the other tokens' logits read other rows.
        followed = logits if logits is not None and logits.dim() == 2 else logit[:, None]
        read = tokens_read(WHO, self.model, run.record, followed, real_keys(run), advice="")
        return unnamed_rows(WHO, None, run.trace.layers[-1], read)

    def _arithmetic(self, layer: LayerTrace) -> torch.dtype:
        return self.dtype or (torch.float64 if layer.q.dtype == torch.float64 else torch.float32)

    def _roll_out(self, layers: list[LayerTrace], grads: list[Tensor], r: Tensor) -> Tensor:
        """Multiply r (B, 1, n) by I + A of each layer, last layer first."""
        for layer, grad in zip(reversed(layers), reversed(grads), strict=True):
            tensors = (t.detach().to(r.dtype) for t in (layer.q, layer.k, layer.v, layer.lse, grad))
            mod = layer.score_mod
            r = relevance_rollout_step(
                r.to(grad.device),
                *tensors,
                None,
                key_mask=layer.key_mask,
                scaling=layer.scaling,
                window=layer.window,
                cu_seqlens=layer.cu_seqlens,
                score_mod=None if mod is None else to_dtype(mod, r.dtype),
                backend=self.backend,
            )
        return r


def _unit_rows(rows: Tensor, layer: LayerTrace, dtype: torch.dtype) -> Tensor:
    """Return the rows of the identity at positions rows, or the mean that rows gives, (B, 1, n)."""
    if rows.is_floating_point():
        return rows.to(dtype)
    size, n = layer.q.shape[0], layer.q.shape[2]
    index = rows[:, None] if layer.cu_seqlens is None else rows.T[None].to(layer.q.device)
    return torch.zeros(size, 1, n, dtype=dtype, device=layer.q.device).scatter_(2, index, 1)


def _positions(rows: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
    """Return the position in its own sequence of each row (B, 1), or None for a mean of tokens."""
    if rows.is_floating_point():
        return None
    return rows[:, 0] if cu_seqlens is None else rows[:, 0] - cu_seqlens[:-1].to(rows.device)
