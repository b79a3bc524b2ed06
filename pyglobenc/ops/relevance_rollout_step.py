"""Op `relevance_rollout_step`: one layer of the rollout of relevance maps in row mode."""

from torch import Tensor

from pyglobenc.backends.dispatch import pick
from pyglobenc.ops._checks import check_floats, check_offsets, check_shape
from pyglobenc.ops._registered import register
from pyglobenc.ops.relevance_attention import check_relevance_args

BACKENDS = ("triton", "cuda", "cpu", "reference")


def relevance_rollout_step(
    r: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    grad_o: Tensor | None,
    s: Tensor,
    *,
    key_mask: Tensor | None = None,
    scaling: float | None = None,
    window: tuple[int, int] = (-1, -1),
    normalize: bool = False,
    offsets: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Multiply rows of the rollout by one layer's I + A, A never stored: the `r_out` of `relevance_attention`, alone.

    For a layer below which no relevance is wanted. Either T rows of the whole rollout or the unit row of a target start it.

    Args:
        r: rows of the rollout down to this layer, (B, T, n), the dtype of q.
        q, k, v, lse, grad_o, s, key_mask, scaling, window, normalize, offsets, backend: as for `relevance_attention`.

    Returns:
        r (I + A), each row of I + A divided by its sum with normalize, (B, T, n).

    Raises:
        ValueError, TypeError: shapes or dtypes that don't fit, or a backend that can't run.

    Source: Chefer et al., 2021, eq. 13 and 14.
    """
    op = "relevance_rollout_step"
    scaling = check_relevance_args(op, q, k, v, lse, grad_o, s, key_mask, scaling, window)
    sizes = {"B": q.shape[0], "n": q.shape[2]}
    check_shape(op, "r", r, "B T n", sizes)
    check_floats(op, q=q, r=r)
    check_offsets(op, offsets, key_mask, sizes)
    return _relevance_rollout_step(r, q, k, v, lse.to(q.dtype), grad_o, s, key_mask, scaling, *window, normalize, backend, offsets)


@register("relevance_rollout_step")
def _relevance_rollout_step(
    r: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    grad_o: Tensor | None,
    s: Tensor,
    key_mask: Tensor | None,
    scaling: float,
    left: int,
    right: int,
    normalize: bool,
    backend: str,
    offsets: Tensor | None = None,
) -> Tensor:
    args = (r, q, k, v, lse, grad_o, s, key_mask, scaling, (left, right), normalize, offsets)
    return pick("relevance_rollout_step", backend, BACKENDS, args)(*args)


@_relevance_rollout_step.register_fake
def _(r, q, k, v, lse, grad_o, s, key_mask, scaling, left, right, normalize, backend, offsets=None):
    return r.new_empty(r.shape)
