"""Tiles of the norms of decomposed vectors for all heads, which `pair_norms` and `rollout_step` share.

    norm[i, j]^2 = a^T G[j] a + (i == j) (2 a . c[i] + residual_sq[i])
    a = alpha[:, i, j] = exp(scaling q[:, i] . k[:, j] - lse[:, i])

A program holds BLOCK_J keys and streams BLOCK_I queries. One 3-D product, batched over heads, gives the
scores. A second one, batched over keys, multiplies alpha by G. So both run on tensor cores, and no list of
per-head tiles fills the registers.

Counted in sm_90 code of Triton 3.9 for BERT-base in bfloat16: a pair takes 14 issue slots with three tf32
products, 10 with one, and 17 with the quadratic form on CUDA cores. Shared memory is the limit with 5.5
cycles a pair; 3.4 cycles of issue and 0.75 of exponentials run beside it.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyglobenc.backends.inputs import PairInputs
from pyglobenc.backends.shared.launch import HALF
from pyglobenc.backends.shared.masks import sides
from pyglobenc.kernels._device import (
    MAX_HEAD_DIM,
    MAX_HEADS,
    device_reasons,
    float32_precision,
    interpreting,
    positive_part,
    power_of_two,
    processors,
    registers,
    shared_limit,
)

BLOCK_I = 16
# Cost of loading a program's keys and G, in tiles; estimated from the bytes.
START = 3
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def high_bits(x):
    """Return x rounded to tf32.

    With truncation, the part that three products drop would be biased, and 2^-20 instead of 2^-24.
    """
    return ((x.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def product(a, b, FORM: tl.constexpr):
    """Return the batched product a @ b; "tf32x3" takes three tf32 products.

    Triton's own tf32x3 also checks every entry for NaN, which is 130 of 853 instructions a tile.
    """
    if FORM == "tf32x3":
        high_a, high_b = high_bits(a), high_bits(b)
        out = tl.dot(a - high_a, high_b, input_precision="tf32")
        out = tl.dot(high_a, b - high_b, out, input_precision="tf32")
        return tl.dot(high_a, high_b, out, input_precision="tf32")
    else:
        return tl.dot(a, b, input_precision=FORM)


@triton.jit
def settled(x, FORM: tl.constexpr):
    """Return x in the register layout that a product over its last axis needs.

    Without this, Triton moves x through shared memory with eightfold bank conflicts.
    """
    # With 64 heads the registers would spill.
    if FORM == "ieee" or x.shape[2] > 32:
        return x
    else:
        left = tl.zeros((x.shape[0], x.shape[1], 16), tl.float32)
        # A tensor added to a product is laid out like the result; the product itself is zero.
        return tl.dot(left, tl.zeros((x.shape[0], 16, x.shape[2]), tl.float32), x, input_precision="tf32")


@triton.jit
def probability(scores, lse):
    """Return exp(scores - lse).

    lse is subtracted before the change of base. Otherwise the rounding error would grow with lse.
    """
    # Unlike tl.exp, exp2 does not treat subnormal results apart, which saves 96 of 607 instructions a tile.
    return tl.exp2((scores - lse) * LOG2E)


@triton.jit
def load_heads(
    X, stride_h, stride_n, heads, head_ok, rows, row_ok, d, HEAD_DIM: tl.constexpr, UPCAST: tl.constexpr
):
    """Load X[head, row, d] as (heads, rows, d); 0 outside."""
    offsets = (
        heads.to(tl.int64)[:, None, None] * stride_h
        + rows.to(tl.int64)[None, :, None] * stride_n
        + d[None, None, :]
    )
    ok = head_ok[:, None, None] & row_ok[None, :, None] & (d < HEAD_DIM)[None, None, :]
    x = tl.load(X + offsets, mask=ok, other=0.0)
    # The interpreter computes bfloat16 arithmetic wrongly.
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def load_gram(G, stride_n, stride_h, stride_g, heads, head_ok, j, j_ok):
    """Load G[j] as (keys, heads, heads). It is 0 outside, so that padded heads add nothing."""
    offsets = (
        j.to(tl.int64)[:, None, None] * stride_n
        + heads[None, :, None] * stride_h
        + heads[None, None, :] * stride_g
    )
    return tl.load(
        G + offsets, mask=j_ok[:, None, None] & head_ok[None, :, None] & head_ok[None, None, :], other=0.0
    )


@triton.jit
def hold_keys(
    K, stride_h, stride_n, heads, head_ok, group, j, j_ok, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    HELD: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Load the keys j as (heads, d, keys) to be held on chip; 0.0 unless HELD."""
    if HELD:
        k = load_heads(
            K, stride_h, stride_n, heads // group, head_ok, j, j_ok, tl.arange(0, BLOCK_D), HEAD_DIM, UPCAST
        )
        return tl.permute(k, (0, 2, 1))
    else:
        return 0.0


@triton.jit
def own_term(
    Q, K, LSE, CROSS, RESIDUAL_SQ, stride_qh, stride_qn, stride_kh, stride_kn, stride_lh, stride_ln,
    stride_cn, stride_ch, stride_rn,
    heads, head_ok, group, j, j_ok, scaling, HEAD_DIM: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Return 2 alpha[:, j, j] . c[j] + residual_sq[j] for each key j, (keys,)."""
    d = tl.arange(0, 16)
    scores = tl.zeros((heads.shape[0], j.shape[0]), tl.float32)
    for start in range(0, HEAD_DIM, 16):
        q = load_heads(Q, stride_qh, stride_qn, heads, head_ok, j, j_ok, start + d, HEAD_DIM, UPCAST)
        k = load_heads(K, stride_kh, stride_kn, heads // group, head_ok, j, j_ok, start + d, HEAD_DIM, UPCAST)
        scores += tl.sum(q.to(tl.float32) * k.to(tl.float32), 2)
    ok = head_ok[:, None] & j_ok[None, :]
    j64 = j.to(tl.int64)
    lse = tl.load(
        LSE + heads.to(tl.int64)[:, None] * stride_lh + j64[None, :] * stride_ln, mask=ok, other=0.0
    ).to(tl.float32)
    cross = tl.load(CROSS + j64[None, :] * stride_cn + heads[:, None] * stride_ch, mask=ok, other=0.0)
    alpha = probability(scores * scaling, lse)
    return 2 * tl.sum(alpha * cross, 0) + tl.load(RESIDUAL_SQ + j64 * stride_rn, mask=j_ok, other=0.0)


@triton.jit
def tile_norms(
    Q, K, LSE, stride_qh, stride_qn, stride_kh, stride_kn, stride_lh, stride_ln, heads, head_ok, group, i,
    i_ok, j, j_ok, k_held, gram,
    own, scaling, left, right, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HELD: tl.constexpr,
    HAS_OWN: tl.constexpr,
    HAS_WINDOW: tl.constexpr, SCORES: tl.constexpr, FORM: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Return the norms of a tile without the row scale, (keys, queries).

    They are 0 outside the window, and undefined at rows and keys that are not ok.
    """
    d = tl.arange(0, BLOCK_D)
    if HELD:
        q = load_heads(Q, stride_qh, stride_qn, heads, head_ok, i, i_ok, d, HEAD_DIM, UPCAST)
        scores = tl.dot(q, k_held, input_precision=SCORES)
    else:
        scores = tl.zeros((heads.shape[0], i.shape[0], j.shape[0]), tl.float32)
        for start in range(0, HEAD_DIM, BLOCK_D):
            q = load_heads(Q, stride_qh, stride_qn, heads, head_ok, i, i_ok, start + d, HEAD_DIM, UPCAST)
            k = load_heads(
                K, stride_kh, stride_kn, heads // group, head_ok, j, j_ok, start + d, HEAD_DIM, UPCAST
            )
            scores = tl.dot(q, tl.permute(k, (0, 2, 1)), scores, input_precision=SCORES)
    at = heads.to(tl.int64)[:, None] * stride_lh + i.to(tl.int64)[None, :] * stride_ln
    lse = tl.load(LSE + at, mask=head_ok[:, None] & i_ok[None, :], other=0.0).to(tl.float32)
    alpha = settled(tl.permute(probability(scores * scaling, lse[:, :, None]), (2, 1, 0)), FORM)
    sq = tl.sum(product(alpha, gram, FORM) * alpha, 2)
    if HAS_OWN:
        sq += tl.where(i[None, :] == j[:, None], own[:, None], 0.0)
    norms = tl.sqrt(positive_part(sq))
    if HAS_WINDOW:
        # lse does not include the scores of hidden keys, so their exponential may be infinite.
        norms = tl.where((j[:, None] - i[None, :] <= right) & (i[None, :] - j[:, None] <= left), norms, 0.0)
    return norms


@cache
def launch(
    n_heads: int, head_dim: int, itemsize: int, precision: str, limit: int
) -> dict[str, int | bool] | None:
    """Return tile sizes and warps for a shape and a shared-memory limit, or None if nothing fits.

    The queries are read once for every block of keys: 2 H dh / BLOCK_J bytes a pair in half precision. With
    16 keys that is 96 bytes a pair for BERT-base, and reading them from L2 takes longer than the arithmetic,
    about 10 ps. So a block takes as many keys as fit, and holds them on chip if possible. Larger tiles spill.
    Without the limit on registers, ptxas spills a few to stay at 128.
    """
    # A product over heads needs at least 16 of them.
    heads = power_of_two(n_heads, 16)
    whole = power_of_two(head_dim, 16)
    for block_j in (32, 16, 8, 4, 2):
        for block_d in (16,) if itemsize == 4 else (whole, 16):
            held = block_d == whole
            fits = shared_bytes(heads, BLOCK_I, block_j, block_d, held, itemsize, precision) <= limit
            if fits and heads**2 * block_j <= (8_192 if itemsize == 4 else 16_384):
                tile = dict(HEADS=heads, BLOCK_I=BLOCK_I, BLOCK_J=block_j, BLOCK_D=block_d, HELD=held)
                return tile | dict(num_warps=8, num_stages=1) | registers(255)
    return None


def shared_bytes(
    heads: int, block_i: int, block_j: int, block_d: int, held: bool, itemsize: int, precision: str
) -> int:
    """Return an upper bound of a tile's shared memory in bytes.

    It holds G, the keys if they are held, and one after the other alpha and the other operands.
    """
    split = 2 if precision == "tf32x3" else 1
    row = heads * block_d * itemsize
    keys = block_j * row * (split if itemsize == 4 else 1)
    gram = split * 4 * block_j * heads**2
    operands = block_i * row + (0 if held else keys)
    return gram + (keys if held else 0) + max(4 * heads * block_i * block_j, operands) + 2_048


def pair_arguments(inputs: PairInputs) -> dict[str, Any]:
    """Return the arguments that all kernels over pairs take, by name.

    These are tensors, sizes, strides, flags and tile sizes.
    """
    precision = float32_precision()
    q, k = (t if t.stride(-1) == 1 else t.contiguous() for t in (inputs.q, inputs.k))
    lse, gram, cross, residual_sq = inputs.lse, inputs.gram, inputs.cross, inputs.residual_sq
    rstd, key_mask, (left, right) = inputs.rstd, inputs.key_mask, sides(inputs.window, q.shape[2])
    _, n_heads, n, head_dim = q.shape
    tensors = dict(
        Q=q, K=k, LSE=lse, GRAM=gram, CROSS=cross, RESIDUAL_SQ=residual_sq, RSTD=rstd, MASK=key_mask
    )
    sizes = dict(
        scaling=inputs.scaling, n=n, n_heads=n_heads, group=n_heads // k.shape[1], left=left, right=right
    )
    steps = (
        strides(q, "qb qh qn")
        | strides(k, "kb kh kn")
        | strides(lse, "lb lh ln")
        | strides(gram, "gb gn gh gg")
    )
    steps |= (
        strides(cross, "cb cn ch")
        | strides(residual_sq, "xb xn")
        | strides(rstd, "sb sn")
        | strides(key_mask, "mb mn")
    )
    flags = dict(
        HEAD_DIM=head_dim,
        HAS_OWN=cross is not None,
        HAS_RSTD=rstd is not None,
        HAS_MASK=key_mask is not None,
        HAS_WINDOW=max(inputs.window) >= 0,
        # Products of two half-precision numbers are exact in tf32.
        SCORES=precision if q.dtype == torch.float32 else "tf32",
        FORM=precision,
        UPCAST=interpreting(),
    )
    tiles = launch(n_heads, head_dim, q.element_size(), precision, shared_limit(q.device))
    return tensors | sizes | steps | flags | tiles


def places(device: torch.device) -> int:
    """Return how many programs run at a time: two on each multiprocessor."""
    return 2 * processors(device)


def strides(t: Tensor | None, axes: str) -> dict[str, int]:
    """Return the strides of a tensor, or zeros for None, by the names of a kernel's parameters."""
    names = axes.split()
    steps = (0,) * len(names) if t is None else t.stride()
    return {f"stride_{name}": step for name, step in zip(names, steps, strict=False)}


def pair_reasons(inputs: PairInputs, **others: Tensor | None) -> list[str]:
    """Return why a kernel over pairs can't run on these inputs and the op's other tensors."""
    reasons, q, gram = device_reasons({**inputs.tensors(), **others}), inputs.q, inputs.gram
    reasons += inputs.reference_alone()
    if gram.dtype != torch.float32 or q.dtype not in (*HALF, torch.float32):
        reasons.append(
            f"needs gram in float32 and q in float16, bfloat16 or float32, got {gram.dtype} and {q.dtype}"
        )
    n_heads, head_dim = q.shape[1], q.shape[3]
    if n_heads > MAX_HEADS or head_dim > MAX_HEAD_DIM:
        reasons.append(f"takes up to {MAX_HEADS} heads of up to {MAX_HEAD_DIM}, got {n_heads} of {head_dim}")
    elif (
        not reasons
        and launch(n_heads, head_dim, q.element_size(), float32_precision(), shared_limit(q.device)) is None
    ):
        reasons.append(f"no tile of {n_heads} heads of {head_dim} fits the device's shared memory")
    return reasons
