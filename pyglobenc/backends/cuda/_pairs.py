"""What the launchers of the kernels over (query, key) pairs share: csrc/cuda/pair_tile.h."""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from pyglobenc.backends.cuda import _extension
from pyglobenc.backends.reference.attention import sides
from pyglobenc.backends.shared.grids import query_shares

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
    if not pair_tile(q.device, heads, k.shape[1], head_dim, q.element_size())[0]:
        return [f"no tile of {heads} heads of {head_dim} fits the device's shared memory"]
    return []


@cache
def pair_tile(device: torch.device, heads: int, kv_heads: int, head_dim: int, size: int) -> tuple[int, int]:
    """Keys of a block and queries of a tile, for q and k of `size` bytes an entry; no keys where nothing fits the device."""
    with _extension.launching(device):
        return _extension.kernels.pair_tile(heads, kv_heads, head_dim, size)


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; each has room for one block."""
    with _extension.launching(device):
        return _extension.kernels.processors()


def in_pieces(t: Tensor, unit: int = PIECE) -> Tensor:
    """t with rows of whole units, in bytes, that can be read in pieces: a padded copy where they can't."""
    size, (*steps, last) = t.element_size(), t.stride()
    if last == 1 and math.gcd(t.data_ptr(), size * math.gcd(*steps)) % PIECE == 0 and t.shape[-1] * size % unit == 0:
        return t
    return F.pad(t, (0, -t.shape[-1] % (unit // size))).contiguous()


def near(t: Tensor) -> Tensor:
    """t, copied where its heads lie 2 GiB or more apart: what the kernels count in 32 bits."""
    return t if t.stride(1) * t.element_size() < 2**31 else t.contiguous()


def run_pairs(op: str, given: tuple[Tensor | None, ...], outs: tuple[Tensor | None, ...], longest: int, scaling: float, window) -> None:
    """Launch an op.

    Args:
        given: q, k, lse, gram, cross, residual_sq, rstd, key_mask, rows, r, offsets and log_scale.
        outs: for the result; for a rollout's rows and their scale.
        longest: queries that a key may meet at most.
    """
    q, k, lse, *others = given
    rows, r, offsets, _ = given[8:]
    q, k, lse = in_pieces(near(q), STEP), in_pieces(near(k), STEP), near(lse.float())
    kernels, (batch, heads, n, head_dim) = _extension.kernels, q.shape
    n_queries, n_rows = n if rows is None else rows.shape[1], 0 if r is None else r.shape[1]
    keys, queries = pair_tile(q.device, heads, k.shape[1], head_dim, q.element_size())
    blocks = -(-n // keys) * batch * max(1, -(-n_rows // kernels.MAX_ROWS))
    shares = query_shares(blocks, -(-longest // queries), processors(q.device), START)
    room = outs[0].new_empty(kernels.pair_room(batch, heads, n, n_queries, n_rows, shares, offsets is not None))
    tensors = (q, k, lse, *others, *outs, room)
    exact = q.dtype == torch.float32 and not _extension.allows_tf32()
    with _extension.launching(q.device) as stream:
        getattr(kernels, op)(tensors, scaling, *sides(window, n), shares, exact, stream)
