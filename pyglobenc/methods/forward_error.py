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
from pyglobenc.reference.safe_division import GUARD
from pyglobenc.reference.token_norms import take_queries

# queries of an example that stand for all of them
SAMPLED = 16


@dataclass
class LayerError:
    """Squared errors of a layer's tensors.

    Attributes:
        read: (B, n, 1), of what queries, keys and values are projected from, mean over the features.
        o: (B, H, 1, dh), of the attention's output beside its own rounding, mean over the tokens.
        attended, returned: (B, n, d), of what is divided by the residual sum of the attention, and of the MLP, relative.
        token: (B, 2, H, 1, n), the explained token's probabilities, and their squared errors.
        token_o: (B, H, 1, dh), its attention output; not an error.
    """

    read: Tensor
    o: Tensor
    attended: Tensor
    returned: Tensor
    token: Tensor
    token_o: Tensor


@dataclass
class Sample:
    """Queries that stand for all, of every layer, where its tensors lie.

    Attributes:
        rows: (B, SAMPLED + 1), spread evenly over the real tokens, and the explained token.
        hidden: (B, 1, 1, n) bool, keys that are padding, or None.
        share: (B, 1, n), 1 / their number at real tokens, 0 at others.
    """

    rows: Tensor
    hidden: Tensor | None
    share: Tensor

    @classmethod
    def of(cls, layer: LayerTrace, position: Tensor) -> "Sample":
        x, mask = layer.x, layer.key_mask
        batch, n, _ = x.shape
        steps = torch.arange(SAMPLED, device=x.device)
        if mask is None:
            rows, hidden, share = (steps * n // SAMPLED).expand(batch, -1), None, x.new_full((batch, 1, n), 1 / n)
        else:
            count = mask.sum(1, keepdim=True)
            real = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
            rows, hidden, share = real.gather(1, steps * count // SAMPLED), ~mask[:, None, None], (mask / count).to(x.dtype)[:, None]
        return cls(torch.cat([rows, position.to(x.device)[:, None]], 1), hidden, share)

    def to(self, device: torch.device) -> "Sample":
        """The same on a device: the parts of a model may lie on several."""
        return Sample(self.rows.to(device), None if self.hidden is None else self.hidden.to(device), self.share.to(device))


def forward_errors(states: States, weights: WeightCache) -> list[LayerError]:
    """Errors of every layer of a forward pass, first to last."""
    errors, x, sample = [], states.layers[0].x.square(), Sample.of(states.layers[0], states.head.position)
    for layer, above in zip(states.layers, [*states.layers[1:], None], strict=True):
        m, x, sample = layer.modules, x.to(layer.x.device), sample.to(layer.x.device)
        hidden, mlp = states.take(m.mlp_output)
        y, _ = states.take(m.intermediate)
        merged, attended = states.take(m.output)
        read = x
        if m.pre_norm:
            read = _after_norm(x, layer, "attention_norm", states.take(m.query)[0])
        read = read.mean(-1, keepdim=True)
        o, token, token_o = attention_error(layer, read, sample, weights)
        within = _plus_mean_square(o.mean((1, 3))[..., None], merged)
        at_attended, by_attended = _after_sum(attended, layer.x, x, within, m.output, weights)
        norm = "output_norm" if m.pre_norm else "attention_norm"
        at_y = _after_norm(at_attended, layer, norm, y)
        active = (hidden > 0).mean(-1, keepdim=True, dtype=y.dtype)
        within = active.mul_(at_y.mean(-1, keepdim=True)).mul_(weights.mean_row_norm(m.intermediate, y.dtype))
        within = _plus_mean_square(within, hidden, 2)
        residual, error = (layer.x + attended, at_attended) if m.pre_norm else (y, at_y)
        at_returned, by_returned = _after_sum(mlp, residual, error, within, m.mlp_output, weights)
        errors.append(LayerError(read, o, by_attended, by_returned, token, token_o))
        normalised = above is not None and not m.pre_norm
        x = _after_norm(at_returned, layer, "output_norm", above.x.to(at_returned.device)) if normalised else at_returned
    return errors


def attention_error(layer: LayerTrace, read: Tensor, sample: Sample, weights: WeightCache) -> tuple[Tensor, Tensor, Tensor]:
    """What `LayerError` holds of the attention: o, token and token_o."""
    q, o_rows = (take_queries(t, sample.rows) for t in (layer.q, layer.o))
    q *= layer.scaling
    scores = q @ layer.k.transpose(2, 3)
    if sample.hidden is not None:
        scores.masked_fill_(sample.hidden, float("-inf"))
    alpha = scores.softmax(-1)
    # a part common to all scores changes nothing
    mean_key = (sample.share @ layer.k.transpose(1, 2).flatten(2)).view_as(o_rows[:, :, :1])
    at_scores = score_error(layer, q, sample.rows, read, (layer.k - mean_key).square_(), weights, layer.scaling)
    weight = alpha.square()
    moved = at_scores.mul_(weight)
    token, token_o = torch.stack([alpha[:, :, SAMPLED:], moved[:, :, SAMPLED:]], dim=1), o_rows[:, :, SAMPLED:]
    weight, moved, o_rows = (t[:, :, :SAMPLED] for t in (weight, moved, o_rows))
    v_sq = layer.v.square()
    # moved (v - o)^2 = moved v^2 - 2 o (moved v - o moved / 2)
    inner = torch.addcmul(moved @ layer.v, o_rows, moved.sum(-1, keepdim=True), value=-0.5)
    spread = (moved @ v_sq).addcmul_(o_rows, inner, value=-2).clamp_(min=0).mean(2, keepdim=True)
    at_v = v_sq.addcmul_(read[:, None], row_norms(layer, layer.modules.value, weights))
    return spread + weight.mean(2, keepdim=True) @ at_v, token, token_o


def score_error(layer: LayerTrace, q: Tensor, rows: Tensor, read: Tensor, k_sq: Tensor, weights: WeightCache, scaling: float = 1) -> Tensor:
    """Squared error of scaling q . k for the queries `rows` (B, m), (B, H, m, n); q: these, scaled; k_sq: squares of keys, or of keys
    less what all scores share."""
    m = layer.modules
    at_k = torch.addcmul(k_sq, layer.k, layer.k, value=2).addcmul_(read[:, None], row_norms(layer, m.key, weights))
    by_query = row_norms(layer, m.query, weights) @ k_sq.transpose(2, 3)
    return (q.square() @ at_k.transpose(2, 3)).addcmul_(read.gather(1, rows[..., None])[:, None], by_query, value=scaling**2)


def row_norms(layer: LayerTrace, module: nn.Linear, weights: WeightCache) -> Tensor:
    """Of the module of queries, keys or values, by head, (H, 1, dh)."""
    return weights.row_norms(module, layer.q.dtype).view(layer.q.shape[1], 1, layer.q.shape[3])


def _after_sum(a: Tensor, b: Tensor, at_b: Tensor, read: Tensor, module: nn.Linear, weights: WeightCache) -> tuple[Tensor, Tensor]:
    """Error of a + b, (B, n, d), and relative of a division by it; a: returned by a module that read the error `read` (B, n, 1)."""
    z = a + b
    square = torch.addcmul(weights.number(GUARD**2, z), z, z)
    error = (square + at_b).addcmul_(a, a).addcmul_(read, weights.row_norms(module, a.dtype))
    # where the sum is 0 nothing is divided by it
    return error, error / square


def _after_norm(error: Tensor, layer: LayerTrace, norm: str, returned: Tensor) -> Tensor:
    weight, rstd = layer.norm_weight(norm), layer.norms[norm].rstd
    scale = weight.to(error.dtype).square() * rstd.to(error.dtype).square()[..., None]
    return returned.square().addcmul_(error, scale)


def _plus_mean_square(error: Tensor, t: Tensor, count: int = 1) -> Tensor:
    """error (B, 1 or n, 1) and count times the mean square of every token of t (B, n, d), (B, n, 1)."""
    norm = torch.linalg.vector_norm(t, dim=-1, keepdim=True)
    return torch.addcmul(error, norm, norm, value=count / t.shape[-1])
