"""What the launchers of the kernels over (query, key) pairs share: csrc/cuda/pair_tile.h."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pyglobenc.cuda import _extension
from pyglobenc.grids import query_shares
from pyglobenc.reference.attention import sides

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256
PIECE, STEP = 16, 64  # bytes that a lane, and that a quad of lanes, load at once
START = 2  # tiles' worth of work, guessed, that a block's keys and forms take to load


def pair_reasons(q: Tensor, k: Tensor, gram: Tensor, **others: Tensor | None) -> list[str]:
    """Why a kernel over pairs can't run on these tensors."""
    reasons = _extension.device_reasons({"q": q, "k": k, "gram": gram, **others})
    (_, heads, _, head_dim), kernels = q.shape, _extension.kernels
    if gram.dtype != torch.float32 or q.dtype not in DTYPES:
        reasons.append(f"needs gram in float32 and q in float16, bfloat16 or float32, got {gram.dtype} and {q.dtype}")
    if reasons:
        return reasons
    if heads > kernels.MAX_HEADS or head_dim > MAX_HEAD_DIM:
        return [f"takes up to {kernels.MAX_HEADS} heads of up to {MAX_HEAD_DIM}, got {heads} of {head_dim}"]
    with _extension.launching(q.device):
        if not kernels.pair_tile(heads, k.shape[1], head_dim, q.element_size())[0]:
            return [f"no tile of {heads} heads of {head_dim} fits the device's shared memory"]
    return []


def in_pieces(t: Tensor, unit: int = PIECE) -> Tensor:
    """t with rows of whole units, in bytes, that can be read in pieces: a padded copy where they can't."""
    piece, step = PIECE // t.element_size(), unit // t.element_size()
    aligned = t.data_ptr() % PIECE == 0 and not any(s % piece for s in t.stride()[:-1])
    if t.stride(-1) == 1 and aligned and t.shape[-1] % step == 0:
        return t
    return F.pad(t, (0, -t.shape[-1] % step)).contiguous()


def near(t: Tensor) -> Tensor:
    """t, copied where its heads lie 2 GiB or more apart: what the kernels count in 32 bits."""
    return t if t.stride(1) * t.element_size() < 2**31 else t.contiguous()


def run_pairs(op: str, given: tuple[Tensor | None, ...], rows, r, spans, out: Tensor, n_queries: int, scaling: float, window) -> Tensor:
    """Launch an op on q, k, lse, gram, cross, residual_sq, rstd and key_mask; out is the result, (shares, *out.shape) for a rollout."""
    q, k, lse, gram, *others = given
    q, k, lse = in_pieces(near(q), STEP), in_pieces(near(k), STEP), near(lse.float())
    kernels, (batch, heads, n, head_dim) = _extension.kernels, q.shape
    with _extension.launching(q.device) as stream:
        keys, queries = kernels.pair_tile(heads, k.shape[1], head_dim, q.element_size())
        passes = 1 if r is None else -(-r.shape[1] // kernels.MAX_ROWS)
        shares = query_shares(-(-n // keys) * batch * passes, -(-n_queries // queries), kernels.processors(), START)
        parts = out if r is None else out.new_empty(shares, *out.shape)
        packed = gram.new_empty(batch, -(-n // kernels.KEYS), kernels.form_size(heads), kernels.KEYS)
        queries = gram.new_empty(batch, 1 if r is None else r.shape[1], n if rows is None else n_queries, 2)
        tensors = (q, k, lse, gram, *others, rows, r, spans, parts, packed, queries)
        getattr(kernels, op)(tensors, scaling, *sides(window, n), shares, not _extension.allows_tf32(), stream)
    if r is None:
        return out
    return parts[0] if shares == 1 else parts.sum(0)
