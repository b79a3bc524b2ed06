"""Op `pair_norms`: norms of the decomposed vector of every (query, key) pair."""

from torch import Tensor

from pyglobenc.backends.dispatch import run
from pyglobenc.backends.inputs import PairInputs
from pyglobenc.backends.shared.score_mods import ScoreMod
from pyglobenc.ops._inputs import check_rows, pair_inputs
from pyglobenc.ops._registered import register

BACKENDS = ("triton", "cuda", "cpu", "reference")


def pair_norms(
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
    score_mod: ScoreMod | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute the norms of a stage's decomposed vectors for all (query, key) pairs, or for chosen queries.

    They are quadratic forms in the attention probabilities:

        norm[i, j]^2 = rstd[i]^2 * (a^T G[j] a + (i == j) (2 a . c[i] + residual_sq[i]))
        a[h] = alpha[h, i, j]

    Args:
        q, k, lse, gram, cross, residual_sq, rstd, key_mask, window, score_mod: fields of
            `pyglobenc.backends.inputs.PairInputs`, which gives their shapes.
        rows: queries to compute, (B, T) int64, or None for all n.
        scaling: factor of q . k; the default is dh ** -0.5.
        backend: "auto" or a backend's name.

    Returns:
        Norms (B, n, n), with a row for each query i and a column for each key j; (B, T, n) with rows. They
        have the dtype of gram.

    Raises:
        ValueError, TypeError: shapes or dtypes that don't fit, or a backend that can't run.

    Source: Modarressi et al., 2022, eq. 6 to 10; Kobayashi et al., 2021.
    """
    op = "pair_norms"
    layer = dict(q=q, k=k, lse=lse, gram=gram, cross=cross, residual_sq=residual_sq, rstd=rstd)
    inputs = pair_inputs(op, **layer, key_mask=key_mask, scaling=scaling, window=window, score_mod=score_mod)
    check_rows(op, rows, q)
    return _pair_norms(inputs, rows, backend)


@register("pair_norms", "Tensor? rows, str backend) -> Tensor", PairInputs)
def _pair_norms(inputs: PairInputs, rows: Tensor | None, backend: str) -> Tensor:
    return run("pair_norms", backend, BACKENDS, inputs, rows)


@_pair_norms.register_fake
def _(inputs, rows, backend):
    batch, _, n, _ = inputs.q.shape
    return inputs.gram.new_empty(batch, n if rows is None else rows.shape[1], n)
