"""Op `rollout_step`: one layer of the rollout in row mode."""

import torch
from torch import Tensor

from pyglobenc.backends.dispatch import run
from pyglobenc.backends.inputs import PairInputs
from pyglobenc.backends.shared.score_mods import ScoreMod
from pyglobenc.ops._checks import check_floats, check_shape
from pyglobenc.ops._inputs import check_rollout, pair_inputs
from pyglobenc.ops._registered import register

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
    cu_seqlens: Tensor | None = None,
    score_mod: ScoreMod | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Multiply rows of the rollout by the norms of a layer, r @ norms, without storing the norms.

    Each row is scaled to maximum 1, and log_scale keeps the scale. The row sums of the norms are about 50 for
    BERT-base, so that the plain product over 24 layers would overflow float32.

    Args:
        r: rows of the rollout of the layers above, (B, T, n), non-negative, the dtype of gram.
        log_scale: natural logarithm of the scale of each row, (B, T).
        q, k, lse, gram, cross, residual_sq, rstd, key_mask, scaling, window, score_mod, backend: as for
            `pair_norms`.
        cu_seqlens: (S + 1,) int32 on the CPU, for S sequences packed into one. Sequence s is tokens
            cu_seqlens[s] to cu_seqlens[s + 1] of N. Then B is 1, r (1, T, N) holds T rows of each sequence at
            its own tokens, and log_scale is (S, T). None: not packed.

    Returns:
        r_out (B, T, n), r @ norms with each row scaled to maximum 1, and log_scale_out (B, T), such that
        r_out * exp(log_scale_out) = (r @ norms) * exp(log_scale). Rows of zeros stay zero. With cu_seqlens
        (1, T, N) and (S, T), for each sequence alone.

    Raises:
        ValueError, TypeError: shapes or dtypes that don't fit, or a backend that can't run.

    Source: Modarressi et al., 2022, section 3.3 (rollout, Abnar and Zuidema, 2020).
    """
    op = "rollout_step"
    layer = dict(
        q=q, k=k, lse=lse, gram=gram, cross=cross, residual_sq=residual_sq, rstd=rstd, key_mask=key_mask
    )
    inputs = pair_inputs(
        op, **layer, scaling=scaling, window=window, cu_seqlens=cu_seqlens, score_mod=score_mod
    )
    sizes = check_rollout(op, r, gram, inputs)
    check_shape(op, "log_scale", log_scale, "B T" if cu_seqlens is None else "S T", sizes)
    check_floats(op, log_scale=log_scale)
    # A log_scale of another dtype, such as float64, keeps that dtype.
    own = log_scale.dtype == r.dtype
    out, scale = _rollout_step(
        inputs, r, log_scale if own else torch.zeros_like(log_scale, dtype=r.dtype), backend
    )
    return out, scale if own else log_scale + scale


@register("rollout_step", "Tensor r, Tensor log_scale, str backend) -> (Tensor, Tensor)", PairInputs)
def _rollout_step(inputs: PairInputs, r: Tensor, log_scale: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return run("rollout_step", backend, BACKENDS, inputs, r, log_scale)


@_rollout_step.register_fake
def _(inputs, r, log_scale, backend):
    return torch.empty_like(r), torch.empty_like(log_scale)
