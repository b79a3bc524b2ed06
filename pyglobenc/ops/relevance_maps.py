"""Op `relevance_maps`: the map A of one layer, which the rollout of transformer attribution multiplies."""

from torch import Tensor

from pyglobenc.backends.dispatch import run
from pyglobenc.backends.inputs import RelevanceInputs
from pyglobenc.ops._inputs import check_rows, relevance_inputs
from pyglobenc.ops._registered import register

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
    """Compute the map A[i,j] = mean_h max(<grad_o[i], v[j]> R_alpha[i,j], 0) of one layer.

    The module docstring of `relevance_attention` defines R_alpha.

    Args:
        rows: queries to compute, (B, T) int64, or None for all n.
        q, k, v, lse, grad_o, s, key_mask, scaling, window, backend: as for `relevance_attention`. If grad_o
            is None, A is the mean of max(R_alpha, 0).

    Returns:
        A (B, n, n), with a row for each query; (B, T, n) with rows. It has the dtype of q.

    Raises:
        ValueError, TypeError: shapes or dtypes that don't fit, or a backend that can't run.

    Source: Chefer et al., 2021, eq. 13, without the identity.
    """
    op = "relevance_maps"
    layer = dict(q=q, k=k, v=v, lse=lse, grad_o=grad_o, s=s)
    inputs = relevance_inputs(op, **layer, key_mask=key_mask, scaling=scaling, window=window)
    check_rows(op, rows, q)
    return _relevance_maps(inputs, rows, backend)


@register("relevance_maps", "Tensor? rows, str backend) -> Tensor", RelevanceInputs)
def _relevance_maps(inputs: RelevanceInputs, rows: Tensor | None, backend: str) -> Tensor:
    return run("relevance_maps", backend, BACKENDS, inputs, rows)


@_relevance_maps.register_fake
def _(inputs, rows, backend):
    batch, _, n, _ = inputs.q.shape
    return inputs.q.new_empty(batch, n if rows is None else rows.shape[1], n)
