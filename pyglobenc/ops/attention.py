"""Op `attention`: softmax attention and its log-sum-exp, with those torch kernels that return both."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pyglobenc.backends.reference.attention import attention as reference_attention
from pyglobenc.backends.shared.launch import HALF, capability
from pyglobenc.backends.shared.masks import hidden_keys, visible_keys
from pyglobenc.backends.shared.packing import by_runs, on_device
from pyglobenc.backends.shared.score_mods import ScoreMod
from pyglobenc.common.autocast import outside_autocast
from pyglobenc.ops._checks import (
    check_cu_seqlens,
    check_floats,
    check_heads,
    check_mask,
    check_shape,
    check_square,
    check_window,
)

aten = torch.ops.aten

# With a local window, a block of queries shares one call and one mask. Its size is the width of the window,
# within these limits.
BAND = (64, 512)


@outside_autocast
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    scaling: float | None = None,
    window: tuple[int, int] = (-1, -1),
    score_mod: ScoreMod | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute softmax attention and the log-sum-exp of its scaled scores.

    The op is differentiable, and its memory is linear in n and m.

    Args:
        q: queries (B, H, n, dh), any float dtype.
        k, v: keys and values (B, Hkv, m, dh), H a multiple of Hkv. In cross attention m may differ from n.
        key_mask: (B, m) bool, True for the keys that may be attended to; None: all.
        scaling: factor of q . k; the default is dh ** -0.5.
        window: (left, right): query i sees the keys i - left to i + right. -1 is unlimited, and (-1, 0) is
            causal. It must be unlimited if n and m differ.
        score_mod: change of the scaled scores before the softmax. The reference computes it.
        cu_seqlens: ends of packed sequences, (S + 1,), as for `rollout_step`. Each sequence attends only to
            itself.

    Returns:
        o (B, H, n, dh), the dtype of q, and lse (B, H, n), natural logarithm, float32 or float64. A query
        that sees no key gets o = 0 and lse = inf, so that exp(score - lse) is 0.

    Raises:
        ValueError, TypeError: shapes or dtypes that don't fit.
    """
    op, sizes = "attention", {}
    check_shape(op, "q", q, "B H n dh", sizes)
    check_shape(op, "k", k, "B Hkv m dh", sizes)
    check_shape(op, "v", v, "B Hkv m dh", sizes)
    check_heads(op, sizes["H"], sizes["Hkv"])
    check_mask(op, key_mask, {"B": sizes["B"], "n": sizes["m"]})
    check_window(op, window)
    check_square(op, window, sizes["n"], sizes["m"])
    check_floats(op, q=q, k=k, v=v)
    if cu_seqlens is not None and sizes["n"] != sizes["m"]:
        raise ValueError(
            f"{op}: packed sequences need as many keys as queries, got {sizes['m']} and {sizes['n']}"
        )
    check_cu_seqlens(op, cu_seqlens, key_mask, sizes)
    scaling = sizes["dh"] ** -0.5 if scaling is None else float(scaling)
    if cu_seqlens is not None:
        return _packed(q, k, v, scaling, window, score_mod, cu_seqlens)
    # A window as wide as the text hides nothing.
    window = tuple(-1 if side >= sizes["n"] - 1 else side for side in window)
    if score_mod is not None or not _has_kernel(q) or not q.numel():
        o, lse = _reference(q, k, v, key_mask, scaling, window, score_mod)
    else:
        group = sizes["H"] // sizes["Hkv"]
        if group > 1:
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        o, lse = _fused(q, k, v, key_mask, scaling, window)
    blind = None if key_mask is None else _sees_nothing(key_mask, window)
    if blind is None:
        return o, lse
    return o.masked_fill(blind[:, None, :, None], 0), lse.masked_fill(blind[:, None], float("inf"))


def _packed(
    q: Tensor, k: Tensor, v: Tensor, scaling: float, window, score_mod, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the attention of each packed sequence alone.

    A GPU takes one flash-attention call; otherwise each run of sequences of equal length takes one call.
    """
    if q.device.type == "cuda" and score_mod is None and _takes_flash(q):
        ends, longest = on_device(cu_seqlens, q.device)
        left, right = (None if side < 0 else side for side in window)
        sizes = (ends, ends, longest, longest, 0.0, False, False)
        tokens = (t[0].transpose(0, 1) for t in (q, k, v))
        out = aten._flash_attention_forward(
            *tokens, *sizes, scale=scaling, window_size_left=left, window_size_right=right
        )
        return out[0].transpose(0, 1)[None], out[1][None]

    def run(*batch: Tensor) -> tuple[Tensor, Tensor]:
        return attention(*batch, scaling=scaling, window=window, score_mod=score_mod)

    return tuple(by_runs(run, (q, k, v), (2, 2, 2), (2, 2), cu_seqlens))


def _reference(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scaling: float, window, score_mod
) -> tuple[Tensor, Tensor]:
    """Compute in float32 or float64, and return the dtype of q."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    o, lse = reference_attention(q.to(wide), k.to(wide), v.to(wide), key_mask, scaling, window, score_mod)
    return o.to(q.dtype), lse


def _fused(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scaling: float, window: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    n = q.shape[2]
    if window in ((-1, -1), (-1, 0)):
        bias = None if key_mask is None else fused_bias(~key_mask[:, None, None, :], q.dtype)
        return fused_call(q, k, v, bias, window == (-1, 0), scaling)
    block = min(max(sum(window), BAND[0]), BAND[1])
    parts = []
    for start in range(0, n, block):
        rows = slice(start, min(n, start + block))
        cols = visible_keys(rows, n, window)
        bias = fused_bias(hidden_keys(rows, cols, window, key_mask, q.device), q.dtype)
        parts.append(fused_call(q[:, :, rows], k[:, :, cols], v[:, :, cols], bias, False, scaling))
    return torch.cat([o for o, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


def fused_bias(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a mask hidden, of any shape such as (B, 1, m, J), into an additive bias of the same shape.

    The bias is finite, so that a query that sees no key does not divide by zero.
    """
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(
        hidden, torch.finfo(dtype).min / 2
    )


def fused_call(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scaling: float
) -> tuple[Tensor, Tensor]:
    """Call torch's kernel once: q (B, H, m, dh), k and v (B, H, J, dh), bias (1 or B, 1, 1 or m, J)."""
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu.default(
            q, k, v, 0.0, causal, attn_mask=bias, scale=scaling
        )
    return gpu_call(q, k, v, bias, causal, scaling)


def gpu_call(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scaling: float
) -> tuple[Tensor, Tensor]:
    """Run torch's kernel on a GPU, where rows are read in steps of 16 bytes.

    q is (B, H, m, dh), k and v are (B, H, J, dh), bias is (1 or B, 1, 1 or m, J) or None. Returns o (B, H, m,
    dh) and lse (B, H, m).
    """
    m, width, keys = q.shape[2], q.shape[3], k.shape[2]
    short = -width % (16 // q.element_size())
    if short:
        # Padding with zeros does not change a score.
        o, lse = gpu_call(*(F.pad(t, (0, short)) for t in (q, k, v)), bias, causal, scaling)
        return o[..., :width], lse
    if bias is None and _takes_flash(q):
        o, lse = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scaling)[:2]
        return o, lse[:, :, :m]
    if bias is not None:
        bias = F.pad(bias, (0, -keys % 8), value=float("-inf"))[..., :keys].expand(
            q.shape[0], q.shape[1], m, keys
        )
    o, lse = aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, causal, scale=scaling)[:2]
    return o, lse[:, :, :m]


def _takes_flash(q: Tensor) -> bool:
    return q.dtype in HALF and q.shape[3] % 8 == 0 and q.shape[3] <= 256 and since_ampere(q.device)


def _has_kernel(q: Tensor) -> bool:
    """Return whether torch has a kernel that returns the log-sum-exp for q's device and dtype."""
    if q.device.type == "cuda":
        return q.dtype in (torch.float32, torch.float16) or (
            q.dtype == torch.bfloat16 and since_ampere(q.device)
        )
    return q.device.type == "cpu"


def since_ampere(device: torch.device) -> bool:
    """Return whether a GPU has flash attention and bfloat16 products.

    All AMD GPUs that torch supports have both.
    """
    return torch.version.hip is not None or capability(device) >= (8, 0)


def _sees_nothing(key_mask: Tensor, window: tuple[int, int]) -> Tensor | None:
    """Return (B, n) bool, True for queries without a real key in their window; None if there are none."""
    left, right = window
    n = key_mask.shape[1]
    if left < 0 and right < 0:
        return None
    # The number of real keys before each position.
    before = F.pad(key_mask.long().cumsum(1), (1, 0))  # (B, n + 1)
    i = torch.arange(n, device=key_mask.device)
    stop = torch.full_like(i, n) if right < 0 else (i + right + 1).clamp(max=n)
    start = torch.zeros_like(i) if left < 0 else (i - left).clamp(min=0)
    return before[:, stop] == before[:, start]
