"""ALTI: contributions of tokens to one another by L1 distance (Ferrando, Gallego and Costa-jussa, 2022).

The output y[i] of the attention block is a sum of vectors T_i(x[j]), one for each token j, and of biases. The
contribution of j to i is

    c[i,j] = max(0, |y[i]|_1 - |y[i] - T_i(x[j])|_1),   divided by the row's sum

In a post-norm layer y is the output of the first LayerNorm, and T_i(x[j]) = (F[i,j] + (i==j) x[i]) passed
through it with the statistics of row i: C diag(gamma) rstd[i], as in the stage N_ResLN of GlobEnc. Here y and
T are divided by rstd[i], which cancels in the row's sum. In a pre-norm layer no LayerNorm follows, so that y
is the residual stream after the attention and T_i(x[j]) = F[i,j] + (i==j) x[i], as Ferrando et al. (2023) use
it for decoders. The MLP mixes no tokens and is left out. The rollout is the product of the layers' matrices.

L1 distances have no Gram form. A layer takes n^2 H d multiply-adds for the pairs that are not hidden (the op
`pyglobenc.ops.proximity`), and about 3 n d^2 for y, f and the diagonal. A block of rows exists at a time.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from pyglobenc.backends.reference.stage_map import stage_map
from pyglobenc.backends.shared.masks import visible_keys
from pyglobenc.backends.shared.packing import slices
from pyglobenc.backends.shared.proximity_tiles import nearer
from pyglobenc.backends.shared.rows import own_attention, rescale_rows
from pyglobenc.backends.shared.score_mods import to_dtype
from pyglobenc.hf import LayerTrace
from pyglobenc.methods.rollout.stages import StageOps
from pyglobenc.ops import proximity

# The numbers of a tile of probabilities, on a CPU where it should stay in a cache, and on a GPU.
TILE, GPU_TILE = 1 << 19, 1 << 25
MIN_KEYS = 32


class AltiMatrix:
    """The normalised contributions of one layer, (B, n, n), which are not stored.

    It is a `LayerMatrix`. Rows of padding are 0, and the other rows sum to 1.
    """

    def __init__(self, layer: LayerTrace, ops: StageOps):
        self.layer, self.ops = layer, ops
        dtype, m = ops.dtype_of(layer), layer.modules
        gammas = [] if m.pre_norm else [layer.norm_weight("attention_norm").detach().to(dtype)]
        weight, x = ops.output_weight(layer), layer.x.detach().to(dtype)
        z = self._sum(weight, x)
        self.weight, self.y = stage_map(weight, gammas), stage_map(z, gammas)
        bias = None if m.pre_norm else layer.norm_parts("attention_norm").bias
        if bias is not None:
            stats = layer.norms["attention_norm"]
            self.y = self.y + bias.detach().to(dtype) / stats.rstd.to(dtype)[..., None]
        self.own = self._own(stage_map(x, gammas))

    @property
    def factors(self) -> Tensor | None:
        """Return the scale (B, n) of each row's attention output in the residual sum; None for 1."""
        if self.layer.modules.added_norm is None:
            return None
        return self.layer.norms["added_norm"].rstd.to(self.ops.dtype_of(self.layer))

    def _sum(self, weight: Tensor, x: Tensor) -> Tensor:
        """Return the residual sum after the attention, (B, n, d), for x (B, n, d)."""
        o = self.layer.o.detach().to(x.dtype).transpose(1, 2).flatten(2)
        added, bias = o @ weight.flatten(0, 1), self.ops.output_bias(self.layer)
        if bias is not None:
            added = added + bias
        return x + (added if self.factors is None else added * self.factors[..., None])

    def _own(self, x: Tensor) -> Tensor:
        """Return c[i,i] of every token before the rows are normalised, (B, n), for the mapped x (B, n, d)."""
        layer, dtype = self.layer, x.dtype
        q, k, v, lse = (t.detach().to(dtype) for t in (layer.q, layer.k, layer.v, layer.lse))
        mod = None if layer.score_mod is None else to_dtype(layer.score_mod, dtype)
        alpha = own_attention(q, k, lse, layer.scaling, mod)
        if self.factors is not None:
            alpha = alpha * self.factors[:, None]
        vectors = alpha[..., None] * v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        vectors = vectors.transpose(1, 2).flatten(2) @ self.weight.flatten(0, 1)
        return nearer(vectors + x, self.y).clamp(min=0)

    def rows(self, targets: Tensor) -> Tensor:
        """Return the rows `targets` (B, T) of the matrix, (B, T, n)."""
        targets = targets.to(self.y.device)
        everything = slice(0, self.y.shape[1])
        y = self.y.gather(1, targets[..., None].expand(-1, -1, self.y.shape[2]))
        return self._normalised(targets, targets, everything, y, self.own.gather(1, targets))

    def step(self, r: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        """Multiply r (B, T, n) with the matrix and scale each row to maximum 1.

        Returns the rows (B, T, n) and log_scale (B, T); for S packed sequences log_scale is (S, T).
        """
        r, log_scale = r.to(self.y), log_scale.to(self.y)
        out = torch.zeros_like(r)
        for rows, cols, block in self._blocks():
            out[:, :, cols] += r[:, :, rows] @ block
        return rescale_rows(out, log_scale, self.layer.cu_seqlens)

    def full(self) -> Tensor:
        """Return the matrix, (B, n, n)."""
        batch, n, _ = self.y.shape
        out = self.y.new_zeros(batch, n, n)
        for rows, cols, block in self._blocks():
            out[:, rows, cols] = block
        return out

    def _blocks(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield blocks of rows of the matrix, with the ranges of the rows and of the keys that they see.

        With the rows of `block_size`, computing f for each block takes an eighth of what the pairs take.
        """
        n, most = self.y.shape[1], block_size(self.y.shape[2], len(self.weight))
        packed = self.layer.cu_seqlens
        for tokens in [slice(0, n)] if packed is None else slices(packed):
            for start in range(tokens.start, tokens.stop, most):
                rows = slice(start, min(tokens.stop, start + most))
                seen = visible_keys(rows, n, self.layer.window)
                cols = slice(max(seen.start, tokens.start), min(seen.stop, tokens.stop))
                i = torch.arange(rows.start, rows.stop, device=self.y.device)[None]
                yield rows, cols, self._normalised(rows, i, cols, self.y[:, rows], self.own[:, rows])

    def _normalised(self, rows: slice | Tensor, i: Tensor, cols: slice, y: Tensor, own: Tensor) -> Tensor:
        """Return rows of the matrix, (B, m, cols).

        Args:
            rows: the range of the rows, or their positions (B, m).
            i: the positions of the rows, (1 or B, m).
            cols: the range of the keys; it holds each row's own token.
            y, own: (B, m, d) and (B, m) of the rows.
        """
        layer, (batch, m, _) = self.layer, y.shape
        step = keys_at_a_time(batch * layer.q.shape[1] * m, y.device)
        out = y.new_empty(batch, m, cols.stop - cols.start)
        i = i.expand(batch, m)
        scale = None if self.factors is None else self.factors.gather(1, i)[:, None, :, None]
        for start in range(cols.start, cols.stop, step):
            keys = slice(start, min(cols.stop, start + step))
            alpha = self.ops.attention_tile(layer, rows, keys)
            if scale is not None:
                alpha = alpha * scale
            v = layer.v[:, :, keys].detach()
            out[:, :, start - cols.start : keys.stop - cols.start] = proximity(
                alpha, v, self.weight, y, backend=self.ops.backend
            )
        out.scatter_(2, (i - cols.start)[..., None], own[..., None])
        if layer.key_mask is not None:
            # Padded tokens may hold any number.
            out.masked_fill_(~layer.key_mask.gather(1, i)[..., None], 0)
        total = out.sum(-1, keepdim=True)
        return out.div_(torch.where(total == 0, 1, total))


def block_size(d: int, heads: int) -> int:
    """Return the number of rows of a block, for hidden states (B, n, d) and H heads."""
    return max(1, 8 * d // heads)


def keys_at_a_time(rows: int, device: torch.device) -> int:
    """Return the number of keys of a tile of probabilities, (B, H, m, keys) with rows = B * H * m."""
    return max(MIN_KEYS, (TILE if device.type == "cpu" else GPU_TILE) // max(1, rows))
