"""Op `mapped_square`: squared norms of the residual, mapped as the decomposed vectors of a stage are."""

from collections.abc import Sequence

from torch import Tensor

from pyglobenc.backends.dispatch import pick
from pyglobenc.backends.reference.mapped_square import result_dtype
from pyglobenc.ops._checks import check_shape, check_widened
from pyglobenc.ops._registered import register

BACKENDS = ("triton", "cuda", "cpu", "reference")
MOST_NORMS = 2


def mapped_square(x: Tensor, gammas: Sequence[Tensor], *, backend: str = "auto") -> Tensor:
    """Squared norm |x[i] M|^2 of each row, M = (C diag(gamma_1)) (C diag(gamma_2)), C the centering matrix.

    Args:
        x: residual input of a layer, (B, n, d), any float dtype.
        gammas: weights (d,) of the LayerNorms that the stage passes, in order, two at most; without any M is the identity. The dtype of
            x, or float32 where that is half precision.
        backend: "auto" or a backend's name.

    Returns:
        (B, n): the dtype of gammas; without any that of x, or float32 for half precision.

    Raises:
        ValueError, TypeError: shapes or dtypes that don't fit, or a backend that can't run.

    Source: Modarressi et al., 2022, eq. 6 to 10, of the residual alone and without the rows' standard deviations.
    """
    op, sizes = "mapped_square", {}
    named = {f"gammas[{index}]": gamma for index, gamma in enumerate(gammas)}
    if len(named) > MOST_NORMS:
        raise ValueError(f"{op}: gammas must be of {MOST_NORMS} LayerNorms at most, got {len(named)}")
    check_shape(op, "x", x, "B n d", sizes)
    for name, gamma in named.items():
        check_shape(op, name, gamma, "d", sizes)
    check_widened(op, {"x": x}, named)
    return _mapped_square(x, list(gammas), backend)


@register("mapped_square")
def _mapped_square(x: Tensor, gammas: list[Tensor], backend: str) -> Tensor:
    return pick("mapped_square", backend, BACKENDS, (x, gammas))(x, gammas)


@_mapped_square.register_fake
def _(x, gammas, backend):
    return x.new_empty(x.shape[:2], dtype=result_dtype(x, gammas))
