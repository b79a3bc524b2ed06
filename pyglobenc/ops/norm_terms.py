"""Op `norm_terms`: the terms of a stage's squared norms, computed from the weights themselves."""

from collections.abc import Sequence

from torch import Tensor

from pyglobenc.backends.dispatch import run
from pyglobenc.ops._checks import check_heads, check_shape, check_widened
from pyglobenc.ops._registered import register
from pyglobenc.ops.mapped_square import MAX_NORMS

BACKENDS = ("cpu", "reference")


def norm_terms(
    v: Tensor,
    weight: Tensor,
    x: Tensor | None = None,
    gammas: Sequence[Tensor] = (),
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute the three terms of which a stage's squared norms consist.

        G[j][h, h'] = <f[h, j] M, f[h', j] M>        c[i][h] = <f[h, i] M, x[i] M>        |x[i] M|^2

    Here f[h, j] = v[h, j] W_O[h] and M = (C diag(gamma_1)) (C diag(gamma_2)), with C the centering matrix.
    The results are those of `head_gram` and `mapped_square`. This op needs no matrix that is prepared from
    the weights, and takes n*d^2 + n*d*H^2/2 multiply-adds.

    Args:
        v: values with their bias, (B, Hkv, n, dh), any float dtype.
        weight: W_O by head, (H, dh, d); the dtype of v, or float32 where that is half precision.
        x: residual input of the layer, (B, n, d), the dtype of v, or None for a stage without it.
        gammas: weights (d,) of the LayerNorms of the stage, in order, at most two; without any, M is the
            identity. They have the dtype of weight.
        backend: "auto" or a backend's name.

    Returns:
        G (B, n, H, H), c (B, n, H) and |x M|^2 (B, n), in the dtype of weight. Without x, the last two are
        None.

    Raises:
        ValueError, TypeError: shapes or dtypes that don't fit, or a backend that can't run.

    Source: Modarressi et al., 2022, eq. 6 to 10, with the square expanded over heads.
    """
    op, sizes = "norm_terms", {}
    named = {f"gammas[{index}]": gamma for index, gamma in enumerate(gammas)}
    if len(named) > MAX_NORMS:
        raise ValueError(f"{op}: gammas must have at most {MAX_NORMS} entries, got {len(named)}")
    check_shape(op, "v", v, "B Hkv n dh", sizes)
    check_shape(op, "weight", weight, "H dh d", sizes)
    check_shape(op, "x", x, "B n d", sizes, optional=True)
    for name, gamma in named.items():
        check_shape(op, name, gamma, "d", sizes)
    check_heads(op, sizes["H"], sizes["Hkv"])
    check_widened(op, {"v": v, "x": x}, {"weight": weight, **named})
    if x is None:
        return _norm_terms(v, weight, list(gammas), backend), None, None
    return _norm_terms_residual(v, weight, x, list(gammas), backend)


@register("norm_terms")
def _norm_terms(v: Tensor, weight: Tensor, gammas: list[Tensor], backend: str) -> Tensor:
    return run("norm_terms", backend, BACKENDS, v, weight, None, gammas)[0]


@_norm_terms.register_fake
def _(v, weight, gammas, backend):
    return weight.new_empty(v.shape[0], v.shape[2], weight.shape[0], weight.shape[0])


@register("norm_terms_residual")
def _norm_terms_residual(
    v: Tensor, weight: Tensor, x: Tensor, gammas: list[Tensor], backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return run("norm_terms", backend, BACKENDS, v, weight, x, gammas)


@_norm_terms_residual.register_fake
def _(v, weight, x, gammas, backend):
    batch, _, n, _ = v.shape
    heads = weight.shape[0]
    return (
        weight.new_empty(batch, n, heads, heads),
        weight.new_empty(batch, n, heads),
        weight.new_empty(batch, n),
    )
