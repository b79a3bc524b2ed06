"""Op `attention`: softmax attention with its log-sum-exp, by torch's own kernels where they return it."""

import torch
from torch import Tensor

from pyglobenc.ops._checks import check_floats, check_heads, check_mask, check_shape, check_window
from pyglobenc.reference.attention import attention as reference_attention

aten = torch.ops.aten


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    scaling: float | None = None,
    window: tuple[int, int] = (-1, -1),
) -> tuple[Tensor, Tensor]:
    """Softmax attention and the log-sum-exp of its scaled scores; differentiable.

    Args:
        q: queries (B, H, n, dh), any float dtype.
        k, v: keys and values (B, Hkv, n, dh), H a multiple of Hkv.
        key_mask: (B, n) bool, True for the keys that may be attended to; None: all.
        scaling: factor of q . k, default dh ** -0.5.
        window: keys that query i sees, i - left to i + right; -1 is unlimited; causal is (-1, 0).

    Returns:
        o (B, H, n, dh), the dtype of q, and lse (B, H, n), natural logarithm, float32 or float64.

    Raises:
        ValueError, TypeError: shapes or dtypes that don't fit.
    """
    op, sizes = "attention", {}
    check_shape(op, "q", q, "B H n dh", sizes)
    check_shape(op, "k", k, "B Hkv n dh", sizes)
    check_shape(op, "v", v, "B Hkv n dh", sizes)
    check_heads(op, sizes["H"], sizes["Hkv"])
    check_mask(op, key_mask, sizes)
    check_window(op, window)
    check_floats(op, q=q, k=k, v=v)
    scaling = sizes["dh"] ** -0.5 if scaling is None else float(scaling)
    causal = tuple(window) == (-1, 0)
    if not causal and tuple(window) != (-1, -1):
        return reference_attention(q, k, v, key_mask, scaling, window)
    group = sizes["H"] // sizes["Hkv"]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    bias = None
    if key_mask is not None:
        bias = torch.zeros(key_mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~key_mask, float("-inf"))[:, None, None, :]
    if q.device.type == "cpu" and q.numel() and not (causal and bias is not None):
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias, scale=scaling)
    if q.device.type == "cuda" and q.numel() and q.dtype != torch.float64:
        return _cuda_attention(q, k, v, bias, causal, scaling)
    return reference_attention(q, k, v, key_mask, scaling, window)


def _cuda_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
    n = q.shape[2]
    if bias is None and q.dtype != torch.float32 and q.shape[3] % 8 == 0:
        out = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scaling)
        return out[0], out[1][:, :, :n]
    if bias is not None:
        # the kernel reads the bias in 16-byte steps
        padded = torch.nn.functional.pad(bias, (0, -n % 8), value=float("-inf"))[..., :n]
        bias = padded.expand(q.shape[0], q.shape[1], n, n)
    out = aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, causal, scale=scaling)
    return out[0], out[1][:, :, :n]
