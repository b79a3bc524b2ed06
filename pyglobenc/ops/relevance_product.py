"""Op `relevance_product`: rows or columns times the map of attention and its gradient, without storing it.

For queries i and keys j, whose numbers may differ:

    A[i,j] = mean_h max(alpha[h,i,j] <grad_o[h,i], v[h,j]>, 0),   alpha = exp(scaling q.k - lse)

The op returns r A, or with transposed r A^T. It adds no identity, so that a small A loses no digits.
"""

from torch import Tensor

from pyglobenc.backends.dispatch import run
from pyglobenc.backends.inputs import RelevanceInputs
from pyglobenc.backends.shared.score_mods import ScoreMod
from pyglobenc.ops._checks import check_floats, check_shape
from pyglobenc.ops._inputs import by_query_head, product_inputs
from pyglobenc.ops._registered import register

BACKENDS = ("triton", "cuda", "cpu", "reference")


def relevance_product(
    r: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    grad_o: Tensor,
    *,
    transposed: bool = False,
    key_mask: Tensor | None = None,
    scaling: float | None = None,
    window: tuple[int, int] = (-1, -1),
    score_mod: ScoreMod | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute r A, or r A^T, for the map A of attention times its gradient in one layer.

    Args:
        r: rows, (B, T, n); with transposed (B, T, m). It has the dtype of q.
        q: queries, (B, H, n, dh), float32 or float64.
        k, v: keys and values, (B, Hkv, m, dh), H a multiple of Hkv. In cross attention m may differ from n.
        lse: log-sum-exp of the queries' scaled scores, (B, H, n), any float dtype.
        grad_o: gradient of the explained value with respect to the attention output, (B, H, n, dh).
        transposed: compute r A^T instead of r A.
        key_mask: (B, m) bool, True for real keys; None: all.
        scaling: factor of q . k; None means dh ** -0.5.
        window: (left, right), as for `attention`. It must be unlimited if n and m differ.
        score_mod: change of the scaled scores before the softmax. The reference computes it.
        backend: "auto" or a backend's name.

    Returns:
        r A, (B, T, m); with transposed r A^T, (B, T, n).

    Raises:
        ValueError, TypeError: shapes or dtypes that don't fit, or a backend that can't run.

    Source: Chefer et al., ICCV 2021, eq. 5.
    """
    op = "relevance_product"
    k, v = by_query_head(op, q, k), by_query_head(op, q, v)
    check_shape(op, "grad_o", grad_o, "B H n dh", dict(zip(("B", "H", "n", "dh"), q.shape, strict=True)))
    # R_alpha is alpha <s, v> / 2, so this s makes it alpha times its gradient.
    seen = dict(key_mask=key_mask, scaling=scaling, window=window, score_mod=score_mod)
    inputs = product_inputs(op, q=q, k=k, v=v, lse=lse, grad_o=None, s=2 * grad_o, **seen)
    sizes = {"B": q.shape[0], "n": q.shape[2], "m": k.shape[2]}
    check_shape(op, "r", r, "B T m" if transposed else "B T n", sizes)
    check_floats(op, r=r, q=q)
    return _relevance_product(inputs, r, bool(transposed), backend)


@register("relevance_product", "Tensor r, bool transposed, str backend) -> Tensor", RelevanceInputs)
def _relevance_product(inputs: RelevanceInputs, r: Tensor, transposed: bool, backend: str) -> Tensor:
    return run("relevance_product", backend, BACKENDS, inputs, r, transposed)


@_relevance_product.register_fake
def _(inputs, r, transposed, backend):
    return r.new_empty(*r.shape[:2], (inputs.q if transposed else inputs.k).shape[2])
