"""Op `relevance_rollout_step`: one layer of the rollout of relevance maps in row mode."""

from torch import Tensor

from pyglobenc.backends.dispatch import run
from pyglobenc.backends.inputs import RelevanceInputs
from pyglobenc.backends.shared.score_mods import ScoreMod
from pyglobenc.ops._inputs import by_query_head, check_rollout, relevance_inputs
from pyglobenc.ops._registered import register

BACKENDS = ("triton", "cuda", "cpu", "reference")


def relevance_rollout_step(
    r: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    grad_o: Tensor | None,
    s: Tensor | None,
    *,
    key_mask: Tensor | None = None,
    scaling: float | None = None,
    window: tuple[int, int] = (-1, -1),
    normalize: bool = False,
    cu_seqlens: Tensor | None = None,
    score_mod: ScoreMod | None = None,
    backend: str = "auto",
) -> Tensor:
    """Multiply rows of the rollout by I + A of one layer, without storing A.

    With s, this is the `r_out` of `relevance_attention` alone, for a layer below which no relevance is
    needed. Without s, A is attention times its gradient, A[i,j] = mean_h max(alpha <grad_o[i], v[j]>, 0).

    Args:
        r: rows of the rollout of the layers above, (B, T, n), the dtype of q.
        k, v: keys and values (B, Hkv, n, dh), the number of query heads H a multiple of Hkv.
        s: as for `relevance_attention`, or None for A without relevance, which needs grad_o.
        score_mod: change of the scaled scores before the softmax. The reference computes it.
        q, lse, grad_o, key_mask, scaling, window, normalize, cu_seqlens, backend: as for
            `relevance_attention`.

    Returns:
        r (I + A), (B, T, n); with normalize each row of I + A is divided by its sum.

    Raises:
        ValueError, TypeError: shapes or dtypes that don't fit, or a backend that can't run.

    Source: Chefer et al., CVPR 2021, eq. 13 and 14; without s Chefer et al., ICCV 2021, eq. 5 and 6.
    """
    op = "relevance_rollout_step"
    if s is None:
        if grad_o is None:
            raise ValueError(f"{op}: grad_o or s must be given")
        # R_alpha is alpha <s, v> / 2, so this s makes it alpha times its gradient.
        grad_o, s = None, 2 * grad_o
    k, v = by_query_head(op, q, k), by_query_head(op, q, v)
    layer = dict(q=q, k=k, v=v, lse=lse, grad_o=grad_o, s=s)
    seen = dict(key_mask=key_mask, scaling=scaling, window=window, cu_seqlens=cu_seqlens, score_mod=score_mod)
    inputs = relevance_inputs(op, **layer, **seen, normalize=normalize)
    check_rollout(op, r, q, inputs)
    return _relevance_rollout_step(inputs, r, backend)


@register("relevance_rollout_step", "Tensor r, str backend) -> Tensor", RelevanceInputs)
def _relevance_rollout_step(inputs: RelevanceInputs, r: Tensor, backend: str) -> Tensor:
    return run("relevance_rollout_step", backend, BACKENDS, inputs, r)


@_relevance_rollout_step.register_fake
def _(inputs, r, backend):
    return r.new_empty(r.shape)
