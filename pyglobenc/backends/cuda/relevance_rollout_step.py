"""One layer of the rollout of relevance maps in row mode, r (I + A): the passes of `relevance_attention` without the relevance.

With `normalize` a pass over rows gives the sums of A's rows first; else the pass over columns is all. 3 n^2 d multiply-adds each.
"""

from torch import Tensor

from pyglobenc.backends.cuda._relevance import relevance_reasons
from pyglobenc.backends.cuda.relevance_attention import CudaPasses


def not_supported(r, q, k, v, lse, grad_o, s, key_mask, scaling, window, normalize, offsets=None) -> list[str]:
    """Why the kernel can't run on these arguments; empty when it can."""
    return relevance_reasons(q, k=k, v=v, lse=lse, grad_o=grad_o, s=s, r=r, key_mask=key_mask)


def relevance_rollout_step(
    r: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    grad_o: Tensor | None,
    s: Tensor,
    key_mask: Tensor | None,
    scaling: float,
    window: tuple[int, int],
    normalize: bool,
    offsets: Tensor | None = None,
) -> Tensor:
    """See `pyglobenc.ops.relevance_rollout_step`: -> (B, T, n)."""
    return CudaPasses(q, k, v, lse, grad_o, s, key_mask, scaling, window, offsets=offsets).rollout_step(r, normalize)
