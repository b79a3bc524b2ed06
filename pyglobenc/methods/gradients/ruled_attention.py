"""Attention under backward rules: the function that transformers calls while a `ModifiedBackward` is active.

With q . k a product and alpha v a product, halving both gives a quarter of the gradient to queries and keys
and half of it to values (AttnLRP, propositions 3.1 to 3.3). So torch's fused attention computes the backward
pass, and nothing of size (n, n) is stored.
"""

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from pyglobenc.backends.shared.score_mods import ScoreMod, SoftCap, TileScores
from pyglobenc.hf.trace.attention import attention_inputs, mask_function
from pyglobenc.methods.gradients.backward_rules import BackwardRules, Scaled, Secant
from pyglobenc.ops.attention import attention

NAME = "pyglobenc-rules"
# The tape of the pass that runs in this thread. It has `rules`, and takes the attention's inputs and output.
TAPE: ContextVar[Any] = ContextVar("pyglobenc_tape")


@dataclass(frozen=True)
class SecantCap(SoftCap):
    """A soft cap whose derivative becomes the slope of its secant."""

    def bind(self, q: Tensor, k: Tensor) -> TileScores:
        cap = super().bind(q, k)
        return lambda scores, rows, i, cols: Secant.apply(scores, lambda s: cap(s, rows, i, cols))


@dataclass(frozen=True)
class Tempered:
    """Another score mod, or None, for scores that were divided by a temperature before it."""

    mod: ScoreMod
    temperature: float

    def bind(self, q: Tensor, k: Tensor) -> TileScores:
        tile, t = self.mod.bind(q, k), self.temperature
        return lambda scores, rows, i, cols: tile(scores * t, rows, i, cols) / t


def ruled_attention(rules: BackwardRules, q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
    """Compute attention whose backward pass follows the rules.

    Args:
        rules: the method.
        q: (B, H, n, dh). k, v: (B, Hkv, n, dh).
        settings: as `pyglobenc.ops.attention` takes them.

    Returns:
        The attention output (B, H, n, dh).
    """
    if not rules.probabilities:
        return attention(q.detach(), k.detach(), v, **settings)[0]
    of_values, of_scores = (0.5, 0.25) if rules.halves else (1.0, 1.0)
    mod = settings["score_mod"]
    if rules.secants and isinstance(mod, SoftCap):
        settings["score_mod"] = SecantCap(mod.cap)
    v = Scaled.apply(v, of_values)
    if rules.temperature == 1:
        return attention(Scaled.apply(q, of_scores), Scaled.apply(k, of_scores), v, **settings)[0]
    o = attention(q.detach(), k.detach(), v, **settings)[0]
    # A second attention has the scores divided by the temperature. Only its gradient counts.
    t = rules.temperature
    q, k = (Scaled.apply(x, t * of_scores) for x in (q, k))
    settings |= dict(scaling=settings["scaling"] / t, score_mod=None if mod is None else Tempered(mod, t))
    tempered = attention(q, k, v.detach(), **settings)[0]
    return o + (tempered - tempered.detach())


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention as transformers asks for it, with the rules of this thread's tape.

    Arguments and errors are those of `pyglobenc.hf.trace.attention.attention_function`.

    Returns:
        The attention output (B, n, H, dh), the query's dtype; and None in place of the weights.
    """
    tape = TAPE.get()
    tensors, settings = attention_inputs(module, query, key, value, attention_mask, scaling, kwargs)
    # The rules apply to the attention as a whole, not to the operations that compute it.
    with torch._C.DisableTorchFunction():
        o = ruled_attention(tape.rules, *tensors, **settings)
    tape.trust(o, tensors if tape.rules.probabilities else tensors[2:])
    return o.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attention_function)
AttentionMaskInterface.register(NAME, mask_function)
