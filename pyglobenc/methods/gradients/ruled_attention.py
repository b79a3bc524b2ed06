"""Attention under backward rules: the function that transformers calls while a `ModifiedBackward` is active.

With q . k a product and alpha v a product, halving both gives a quarter of the gradient to queries and keys
and half of it to values (AttnLRP, propositions 3.1 to 3.3). So torch's fused attention computes the backward
pass, and nothing of size (n, n) is stored.
"""

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from transformers import AttentionInterface, AttentionMaskInterface

from pyglobenc.backends.shared.launch import HALF
from pyglobenc.backends.shared.masks import hidden_keys, visible_keys
from pyglobenc.backends.shared.relevance_tiles import MIN_QUERIES
from pyglobenc.backends.shared.score_mods import ScoreMod, SoftCap, TileScores
from pyglobenc.common.autocast import outside_autocast
from pyglobenc.hf.trace.attention import attention_inputs, mask_function
from pyglobenc.methods.gradients.backward_rules import BackwardRules, Scaled, Secant
from pyglobenc.ops.attention import attention

NAME = "pyglobenc-rules"
# Scores that are lower than all others by this much get the probability 0.
BLIND = 1e30
# The most queries that `TemperedAttention` takes at a time, and the most entries of its arrays of all heads.
# Of 16, 32, 64 and 128 queries, 64 were the fastest for 8 heads of 64 features and 128 to 2,048 tokens.
BLOCK, BLOCK_FLOATS = 64, 1 << 20
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


class ConstantProbabilities(Function):
    """Attention o = p v whose probabilities p are constants, so that only v gets a gradient.

    The gradient of v_j is sum_i p_ij g_i with p_ij = exp(q_i . k_j scaling - lse_i). This is an attention
    too: the keys ask, and the queries answer with g. A further feature adds -lse_i to the scores, and exp of
    the new log-sum-exp undoes the new softmax's division. It takes half the time of the usual backward pass.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, settings: dict[str, Any]) -> Tensor:
        o, lse = attention(q, k, v, **settings)
        ctx.settings = settings
        ctx.save_for_backward(q, k, lse)
        return o

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor, None]:
        q, k, lse = ctx.saved_tensors
        key_mask, scaling = ctx.settings["key_mask"], ctx.settings["scaling"]
        groups = k.shape[1]
        # A query that sees no key has an infinite lse. Then p is 0.
        last = (-lse / scaling).to(q.dtype).clamp(min=-BLIND)[..., None]
        asking = F.pad(k, (0, 1), value=1.0).repeat_interleave(q.shape[1] // groups, 1)
        answering, values = torch.cat([q, last], 3), F.pad(grad, (0, 1))
        # Read from right to left, a causal mask or a window is the same for keys as for queries.
        turned = (t.flip(2) for t in (asking, answering, values))
        o, size = attention(*turned, scaling=scaling, window=ctx.settings["window"])
        summed = (o[..., :-1] * size.exp().to(o.dtype)[..., None]).flip(2)
        of_v = summed.unflatten(1, (groups, -1)).sum(2)
        return None, None, of_v if key_mask is None else of_v * key_mask[:, None, :, None], None


class TemperedAttention(Function):
    """Attention o = p v, whose probabilities get the gradient of softmax(scores / t), times t.

    The backward pass takes one block of queries at a time: e = exp((scores - lse) / t) gives both p = e^t and
    the tempered probabilities e / sum(e). So it needs the products of torch's own backward pass and no
    further one, where a second attention with other scores would need six more.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, temperature: float, settings: dict[str, Any]
    ) -> Tensor:
        o, lse = attention(q, k, v, **settings)
        ctx.temperature, ctx.settings = temperature, settings
        ctx.save_for_backward(q, k, v, lse)
        return o

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, lse = ctx.saved_tensors
        t, scaling, window = ctx.temperature, ctx.settings["scaling"], ctx.settings["window"]
        (batch, heads, n, _), groups = q.shape, k.shape[1]
        # The queries that share a key's head are rows of one product.
        q, lse, grad = (x.unflatten(1, (groups, -1)) for x in (q, lse, grad))
        of_q, of_k, of_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        block = min(BLOCK, max(MIN_QUERIES, BLOCK_FLOATS // max(1, batch * heads * n)))
        for start in range(0, n, block):
            rows = slice(start, min(n, start + block))
            cols = visible_keys(rows, n, window)
            asking, answer, size = (x[:, :, :, rows].flatten(2, 3) for x in (q, grad, lse))
            keys, values = k[:, :, cols], v[:, :, cols]
            e = (asking * (scaling / t)) @ keys.transpose(2, 3)
            e.sub_((size / t)[..., None]).exp_()
            hidden = hidden_keys(rows, cols, window, ctx.settings["key_mask"], q.device)
            if hidden is not None:
                e.unflatten(2, (-1, rows.stop - rows.start)).masked_fill_(hidden[:, :, None], 0)
            # A query that sees no key has e = 0.
            total = e.sum(-1, keepdim=True).clamp_(min=torch.finfo(e.dtype).tiny)
            of_scores = (answer @ values.transpose(2, 3)).mul_(e)
            of_scores.addcmul_(e, of_scores.sum(-1, keepdim=True) / total, value=-1)
            factor = scaling / total
            of_q[:, :, :, rows] = ((of_scores @ keys) * factor).unflatten(2, (q.shape[2], -1))
            of_k[:, :, cols] += of_scores.transpose(2, 3) @ (asking * factor)
            of_v[:, :, cols] += e.pow_(t).transpose(2, 3) @ answer
        return of_q.flatten(1, 2), of_k, of_v, None, None


def value_attention(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
    """Compute attention (B, H, n, dh), of which only v (B, Hkv, n, dh) gets a gradient."""
    q, k = q.detach(), k.detach()
    # Half precision holds too few digits of lse, and a score mod may depend on the order of the tokens.
    if settings["score_mod"] is not None or q.dtype in HALF:
        return attention(q, k, v, **settings)[0]
    return ConstantProbabilities.apply(q, k, v, settings)


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
        return value_attention(q, k, v, **settings)
    of_values, of_scores = (0.5, 0.25) if rules.halves else (1.0, 1.0)
    mod = settings["score_mod"]
    if rules.secants and isinstance(mod, SoftCap):
        settings["score_mod"] = SecantCap(mod.cap)
    v = Scaled.apply(v, of_values)
    if rules.temperature == 1:
        return attention(Scaled.apply(q, of_scores), Scaled.apply(k, of_scores), v, **settings)[0]
    if _by_blocks(q, mod):
        q, k = (Scaled.apply(x, of_scores) for x in (q, k))
        return TemperedAttention.apply(q, k, v, rules.temperature, settings)
    o = value_attention(q, k, v, **settings)
    # A second attention has the scores divided by the temperature. Only its gradient counts.
    t = rules.temperature
    q, k = (Scaled.apply(x, t * of_scores) for x in (q, k))
    settings |= dict(scaling=settings["scaling"] / t, score_mod=None if mod is None else Tempered(mod, t))
    tempered = attention(q, k, v.detach(), **settings)[0]
    return o + (tempered - tempered.detach())


def _by_blocks(q: Tensor, mod: ScoreMod | None) -> bool:
    """Tell whether `TemperedAttention` computes a tempered softmax. On a GPU torch's kernels are faster."""
    return q.device.type == "cpu" and q.dtype not in HALF and mod is None


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
