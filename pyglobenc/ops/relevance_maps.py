"""Op `relevance_maps`: the map of one layer that the rollout of transformer attribution multiplies."""

import torch
from torch import Tensor

from pyglobenc.backends.dispatch import pick
from pyglobenc.common.deferred import check_range
from pyglobenc.ops._checks import check_shape
from pyglobenc.ops._registered import register
from pyglobenc.ops.relevance_attention import check_relevance_args

BACKENDS = ("triton", "cuda", "cpu", "reference")


def relevance_maps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    grad_o: Tensor | None,
    s: Tensor,
    *,
    rows: Tensor | None = None,
    key_mask: Tensor | None = None,
    scaling: float | None = None,
    window: tuple[int, int] = (-1, -1),
    backend: str = "auto",
) -> Tensor:
    """A[i,j] = mean_h max(<grad_o[i], v[j]> R_alpha[i,j], 0), as `relevance_attention` defines it, stored.

    Args:
        rows: queries to compute, (B, T) int64, or None for all n.
        q, k, v, lse, grad_o, s, key_mask, scaling, window, backend: as for `relevance_attention`; without grad_o the mean of
            max(R_alpha, 0).

    Returns:
        A (B, n, n), rows of queries; (B, T, n) with rows. The dtype of q.

    Raises:
        ValueError, TypeError: shapes or dtypes that don't fit, or a backend that can't run.

    Source: Chefer et al., 2021, eq. 13, without the identity.
    """
    op = "relevance_maps"
    scaling = check_relevance_args(op, q, k, v, lse, grad_o, s, key_mask, scaling, window)
    if rows is not None:
        check_shape(op, "rows", rows, "B T", {"B": q.shape[0]})
        if rows.dtype != torch.int64:
            raise TypeError(f"{op}: rows must be int64, got {rows.dtype}")
        check_range(op, "rows", rows, q.shape[2])
    return _relevance_maps(q, k, v, lse.to(q.dtype), grad_o, s, rows, key_mask, scaling, *window, backend)


@register("relevance_maps")
def _relevance_maps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    grad_o: Tensor | None,
    s: Tensor,
    rows: Tensor | None,
    key_mask: Tensor | None,
    scaling: float,
    left: int,
    right: int,
    backend: str,
) -> Tensor:
    args = (q, k, v, lse, grad_o, s, rows, key_mask, scaling, (left, right))
    return pick("relevance_maps", backend, BACKENDS, args)(*args)


@_relevance_maps.register_fake
def _(q, k, v, lse, grad_o, s, rows, key_mask, scaling, left, right, backend):
    return q.new_empty(q.shape[0], q.shape[2] if rows is None else rows.shape[1], q.shape[2])
