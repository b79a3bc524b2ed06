"""Expected rounding error of a forward pass, from its own tensors and the norms of its weights: no second pass.

Squared errors, in units of the rounding unit squared. Every operation adds the square of what it returns, and passes on the error of
what it reads: a Linear by the norms of its rows, a LayerNorm by gamma / std, an activation where it is positive, attention by

    o = sum_j alpha_j v_j:    sum_j alpha_j^2 (var v_j + scaling^2 var(q . k_j) (v_j - o)^2)

as if errors were independent, and alike in all features of a token that a Linear reads.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyglobenc.hf import LayerTrace
from pyglobenc.methods.relevance_states import States
from pyglobenc.methods.weight_cache import WeightCache
from pyglobenc.reference.relevance_attention import probability_tiles
from pyglobenc.reference.token_norms import take_queries

# queries of an example that stand for all of them
SAMPLED = 16


@dataclass
class LayerError:
    """Squared errors of a layer's tensors.

    Attributes:
        read: (B, n, 1), of what queries, keys and values are projected from, mean over the features.
        o: (B, H, 1, dh), of the attention's output beside its own rounding, mean over the tokens.
        attended: (B, n, d), of the attention's residual sum.
        returned: (B, n, d), of the MLP's residual sum.
    """

    read: Tensor
    o: Tensor
    attended: Tensor
    returned: Tensor


def forward_errors(states: States, weights: WeightCache) -> list[LayerError]:
    """Errors of every layer of a forward pass, first to last."""
    errors, x = [], states.layers[0].x.square()
    for layer, above in zip(states.layers, [*states.layers[1:], None], strict=True):
        m, x = layer.modules, x.to(layer.x.device)
        hidden, mlp = states.take(m.mlp_output)
        y, _ = states.take(m.intermediate)
        _, attended = states.take(m.output)
        read = x
        if m.pre_norm:
            read = _after_norm(x, m.attention_norm, layer.norms["attention_norm"].rstd, states.take(m.query)[0])
        read = read.mean(-1, keepdim=True)
        o = attention_error(layer, read, weights)
        merged = o.mean((1, 3)).unsqueeze(-1) + _mean_square(layer.o.transpose(1, 2).flatten(2))
        z = attended + layer.x
        at_attended = z.square_().add_(x).add_(_after_linear(merged, m.output, attended, weights))
        norm = "output_norm" if m.pre_norm else "attention_norm"
        at_y = _after_norm(at_attended, getattr(m, norm), layer.norms[norm].rstd, y)
        active = (hidden > 0).to(y.dtype).mean(-1, keepdim=True)
        within = active * at_y.mean(-1, keepdim=True) * weights.row_norms(m.intermediate, y.dtype).mean() + 2 * _mean_square(hidden)
        residual, error = (layer.x + attended, at_attended) if m.pre_norm else (y, at_y)
        at_returned = (mlp + residual).square_().add_(error).add_(_after_linear(within, m.mlp_output, mlp, weights))
        errors.append(LayerError(read, o, at_attended, at_returned))
        if m.pre_norm or above is None:
            x = at_returned
        else:
            x = _after_norm(at_returned, m.output_norm, layer.norms["output_norm"].rstd, above.x.to(at_returned.device))
    return errors


def attention_error(layer: LayerTrace, read: Tensor, weights: WeightCache) -> Tensor:
    """Error that attention's output inherits, mean over sampled queries, (B, H, 1, dh)."""
    rows = _spread_rows(layer)
    q, o, lse = (take_queries(t, rows) for t in (layer.q, layer.o, layer.lse))
    scores = score_error(layer, read, rows, weights, softmax=True).mul_(layer.scaling**2)
    at_v, v_sq = projection_error(layer.v, read, layer.modules.value, weights), layer.v.square()
    total = torch.zeros_like(o[:, :, :1])
    for tile, _, alpha in probability_tiles(q, layer.k, lse, layer.key_mask, layer.scaling, layer.window, rows):
        weight = alpha.square_()
        moved = weight * scores[:, :, tile]
        own = o[:, :, tile]
        spread = moved @ v_sq - 2 * own * (moved @ layer.v) + own.square() * moved.sum(-1, keepdim=True)
        total += (weight @ at_v + spread.clamp_(min=0)).sum(2, keepdim=True)
    return total / rows.shape[1]


def score_error(layer: LayerTrace, read: Tensor, rows: Tensor, weights: WeightCache, softmax: bool = False) -> Tensor:
    """Squared error of q . k for the queries `rows` (B, m), (B, H, m, n); softmax: of what it changes, a common part left out."""
    m = layer.modules
    at_q, at_k = projection_error(layer.q, read, m.query, weights), projection_error(layer.k, read, m.key, weights)
    at_k += layer.k.square()
    k = layer.k - _mean_key(layer) if softmax else layer.k
    return take_queries(at_q, rows) @ k.square().transpose(2, 3) + take_queries(layer.q, rows).square_() @ at_k.transpose(2, 3)


def projection_error(t: Tensor, read: Tensor, module: nn.Linear, weights: WeightCache) -> Tensor:
    """Squared error of queries, keys or values t, (B, H, n, dh)."""
    rows = weights.row_norms(module, t.dtype).view(t.shape[1], 1, t.shape[3])
    return t.square().addcmul_(read[:, None], rows)


def _spread_rows(layer: LayerTrace) -> Tensor:
    """SAMPLED tokens of every example, evenly spread over the real ones, (B, SAMPLED)."""
    batch, _, n, _ = layer.q.shape
    steps = torch.arange(SAMPLED, device=layer.q.device)
    if layer.key_mask is None:
        return (steps * n // SAMPLED).expand(batch, -1)
    real = layer.key_mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    return real.gather(1, steps * layer.key_mask.sum(1, keepdim=True) // SAMPLED)


def _mean_key(layer: LayerTrace) -> Tensor:
    """Mean of the real keys, (B, H, 1, dh)."""
    if layer.key_mask is None:
        return layer.k.mean(2, keepdim=True)
    real = layer.key_mask[:, None, :, None]
    return (layer.k * real).sum(2, keepdim=True) / real.sum(2, keepdim=True)


def _after_linear(mean: Tensor, module: nn.Linear, returned: Tensor, weights: WeightCache) -> Tensor:
    return returned.square().addcmul_(mean, weights.row_norms(module, returned.dtype))


def _after_norm(error: Tensor, norm: nn.LayerNorm, rstd: Tensor, returned: Tensor) -> Tensor:
    scale = norm.weight.detach().to(error.dtype).square() * rstd.to(error.dtype).square()[..., None]
    return returned.square().addcmul_(error, scale)


def _mean_square(t: Tensor) -> Tensor:
    """Mean over the features, (B, n, 1)."""
    return torch.linalg.vector_norm(t, dim=-1, keepdim=True).square_().div_(t.shape[-1])
