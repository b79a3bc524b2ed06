"""Op `token_norms`: norms of the decomposed vector of every (query, key) pair."""

import torch
from torch import Tensor

from pyglobenc.backends.dispatch import pick
from pyglobenc.common.deferred import check_range
from pyglobenc.ops._checks import check_floats, check_heads, check_mask, check_shape, check_window
from pyglobenc.ops._registered import register

BACKENDS = ("triton", "cuda", "cpu", "reference")


def token_norms(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    gram: Tensor,
    *,
    cross: Tensor | None = None,
    residual_sq: Tensor | None = None,
    rstd: Tensor | None = None,
    key_mask: Tensor | None = None,
    rows: Tensor | None = None,
    scaling: float | None = None,
    window: tuple[int, int] = (-1, -1),
    backend: str = "auto",
) -> Tensor:
    """Norms of one stage's decomposed vectors, from quadratic forms in the attention probabilities.

        norm[i, j]^2 = rstd[i]^2 * (a^T G[j] a + (i == j) (2 a . c[i] + residual_sq[i])),   a[h] = alpha[h, i, j]

    Args:
        q: queries (B, H, n, dh), any float dtype, in the arithmetic of gram's dtype.
        k: keys (B, Hkv, n, dh), H a multiple of Hkv; the dtype of q.
        lse: log-sum-exp of each query's scaled scores, natural logarithm, (B, H, n), any float dtype.
        gram: G of `head_gram`, (B, n, H, H), float32 or float64; so are cross, residual_sq and rstd.
        cross: c of `head_gram`, (B, n, H), or None for a stage without residual.
        residual_sq: squared norm of the mapped residual x[i] M, (B, n); given together with cross.
        rstd: scale of each row, the product of the stage's inverse standard deviations, (B, n), or None for 1.
        key_mask: (B, n) bool, True for real tokens; rows and columns of the others are 0. None: all real.
        rows: queries to compute, (B, T) int64, or None for all n.
        scaling: factor of q . k, default dh ** -0.5.
        window: keys that query i sees, i - left to i + right; -1 is unlimited; causal is (-1, 0).
        backend: "auto" or a backend's name.

    Returns:
        norms (B, n, n), rows i of queries, columns j of keys; (B, T, n) with rows. The dtype of gram.

    Raises:
        ValueError, TypeError: shapes or dtypes that don't fit, or a backend that can't run.

    Source: Modarressi et al., 2022, eq. 6 to 10; Kobayashi et al., 2021.
    """
    scaling = check_attention_args("token_norms", q, k, lse, gram, cross, residual_sq, rstd, key_mask, scaling, window)
    if rows is not None:
        check_shape("token_norms", "rows", rows, "B T", {"B": q.shape[0]})
        if rows.dtype != torch.int64:
            raise TypeError(f"token_norms: rows must be int64, got {rows.dtype}")
        check_range("token_norms", "rows", rows, q.shape[2])
    return _token_norms(q, k, lse, gram, cross, residual_sq, rstd, key_mask, rows, scaling, *window, backend)


def check_attention_args(op, q, k, lse, gram, cross, residual_sq, rstd, key_mask, scaling, window) -> float:
    """Checks that `token_norms` and `rollout_step` share; returns scaling, its default filled in."""
    sizes: dict[str, int] = {}
    check_shape(op, "q", q, "B H n dh", sizes)
    check_shape(op, "k", k, "B Hkv n dh", sizes)
    check_heads(op, sizes["H"], sizes["Hkv"])
    check_shape(op, "lse", lse, "B H n", sizes)
    check_shape(op, "gram", gram, "B n H H", sizes)
    check_shape(op, "cross", cross, "B n H", sizes)
    check_shape(op, "residual_sq", residual_sq, "B n", sizes)
    check_shape(op, "rstd", rstd, "B n", sizes)
    check_mask(op, key_mask, sizes)
    check_window(op, window)
    check_floats(op, q=q, k=k)
    check_floats(op, gram=gram, cross=cross, residual_sq=residual_sq, rstd=rstd)
    check_floats(op, lse=lse)
    if (cross is None) != (residual_sq is None):
        raise ValueError(f"{op}: cross and residual_sq must be given together")
    return sizes["dh"] ** -0.5 if scaling is None else float(scaling)


@register("token_norms")
def _token_norms(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    gram: Tensor,
    cross: Tensor | None,
    residual_sq: Tensor | None,
    rstd: Tensor | None,
    key_mask: Tensor | None,
    rows: Tensor | None,
    scaling: float,
    left: int,
    right: int,
    backend: str,
) -> Tensor:
    args = (q, k, lse, gram, cross, residual_sq, rstd, key_mask, rows, scaling, (left, right))
    return pick("token_norms", backend, BACKENDS, args)(*args)


@_token_norms.register_fake
def _(q, k, lse, gram, cross, residual_sq, rstd, key_mask, rows, scaling, left, right, backend):
    return gram.new_empty(q.shape[0], q.shape[2] if rows is None else rows.shape[1], q.shape[2])
