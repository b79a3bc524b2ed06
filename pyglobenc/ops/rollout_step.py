"""Op `rollout_step`: one layer of the rollout in row mode."""

import torch
from torch import Tensor

from pyglobenc.backends.dispatch import pick
from pyglobenc.ops._checks import check_floats, check_offsets, check_shape
from pyglobenc.ops._registered import register
from pyglobenc.ops.token_norms import check_attention_args

BACKENDS = ("triton", "cuda", "cpu", "reference")


def rollout_step(
    r: Tensor,
    log_scale: Tensor,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    gram: Tensor,
    *,
    cross: Tensor | None = None,
    residual_sq: Tensor | None = None,
    rstd: Tensor | None = None,
    key_mask: Tensor | None = None,
    scaling: float | None = None,
    window: tuple[int, int] = (-1, -1),
    offsets: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Multiply rows of the rollout by a layer's norms, `r @ norms`, without ever storing the norms.

    Rows are kept at maximum 1 and their scale in log_scale: row sums of the norms are about 50 for BERT-base, so the plain product
    over 24 layers overflows float32.

    Args:
        r: rows of the rollout down to this layer, (B, T, n), non-negative; the dtype of gram.
        log_scale: natural logarithm of the scale of each row, (B, T).
        q, k, lse, gram, cross, residual_sq, rstd, key_mask, scaling, window, backend: as for `token_norms`.
        offsets: of S sequences packed into one, (S + 1,) int32, on the CPU: sequence s is tokens offsets[s] to offsets[s + 1] of N. Then
            B is 1, r (1, T, N) holds T rows of every sequence at the sequence's own tokens, and log_scale is (S, T). None: none packed.

    Returns:
        r @ norms, each row scaled to maximum 1, (B, T, n), and the new log_scale (B, T): the plain product times exp(log_scale) is
        r_out * exp(log_scale_out). Rows of zeros stay zero. With offsets the same of each sequence alone, (1, T, N) and (S, T).

    Raises:
        ValueError, TypeError: shapes or dtypes that don't fit, or a backend that can't run.

    Source: Modarressi et al., 2022, section 3.3 (rollout, Abnar and Zuidema, 2020).
    """
    op = "rollout_step"
    scaling = check_attention_args(op, q, k, lse, gram, cross, residual_sq, rstd, key_mask, scaling, window)
    sizes = {"B": q.shape[0], "n": q.shape[2]}
    check_shape(op, "r", r, "B T n", sizes)
    check_offsets(op, offsets, key_mask, sizes)
    check_shape(op, "log_scale", log_scale, "B T" if offsets is None else "S T", sizes)
    check_floats(op, r=r, gram=gram)
    # a scale of another dtype, float64 say, is added to as it is
    own = log_scale.dtype == r.dtype
    given = log_scale if own else torch.zeros_like(log_scale, dtype=r.dtype)
    out, scale = _rollout_step(r, given, q, k, lse, gram, cross, residual_sq, rstd, key_mask, scaling, *window, backend, offsets)
    return out, scale if own else log_scale + scale


@register("rollout_step")
def _rollout_step(
    r: Tensor,
    log_scale: Tensor,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    gram: Tensor,
    cross: Tensor | None,
    residual_sq: Tensor | None,
    rstd: Tensor | None,
    key_mask: Tensor | None,
    scaling: float,
    left: int,
    right: int,
    backend: str,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    args = (r, log_scale, q, k, lse, gram, cross, residual_sq, rstd, key_mask, scaling, (left, right), offsets)
    return pick("rollout_step", backend, BACKENDS, args)(*args)


@_rollout_step.register_fake
def _(r, log_scale, q, k, lse, gram, cross, residual_sq, rstd, key_mask, scaling, left, right, backend, offsets=None):
    return torch.empty_like(r), torch.empty_like(log_scale)
