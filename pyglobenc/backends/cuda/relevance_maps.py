"""Launcher of csrc/cuda/relevance_maps.cu."""

from torch import Tensor

from pyglobenc.backends.cuda._relevance import relevance_reasons
from pyglobenc.backends.cuda.relevance_attention import CudaPasses


def not_supported(q, k, v, lse, grad_o, s, rows, key_mask, scaling, window) -> list[str]:
    """Why the kernel can't run on these arguments; empty when it can."""
    return relevance_reasons(q, k=k, v=v, lse=lse, grad_o=grad_o, s=s, rows=rows, key_mask=key_mask)


def relevance_maps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    grad_o: Tensor | None,
    s: Tensor,
    rows: Tensor | None,
    key_mask: Tensor | None,
    scaling: float,
    window: tuple[int, int],
) -> Tensor:
    """See `pyglobenc.ops.relevance_maps`: -> (B, n, n), or (B, T, n) with rows."""
    batch, _, n, _ = q.shape
    out = q.new_empty(batch, n if rows is None else rows.shape[1], n)
    if out.numel():
        CudaPasses(q, k, v, lse, grad_o, s, key_mask, scaling, window).launch("relevance_maps", rows=rows, map=out)
    return out
