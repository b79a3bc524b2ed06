"""Op `mapped_square`: squared norms of the residual after the linear map of a stage."""

from collections.abc import Sequence

from torch import Tensor

from pyglobenc.backends.dispatch import run
from pyglobenc.backends.reference.mapped_square import result_dtype
from pyglobenc.ops._checks import check_shape, check_widened
from pyglobenc.ops._registered import register

BACKENDS = ("triton", "cuda", "cpu", "reference")
MAX_NORMS = 2


def mapped_square(x: Tensor, gammas: Sequence[Tensor], *, backend: str = "auto") -> Tensor:
    """Compute the squared norm |x[i] M|^2 of each row.

    M = (C diag(gamma_1)) (C diag(gamma_2)) is the linear map of the stage, with C the centering matrix.

    Args:
        x: residual input of a layer, (B, n, d), any float dtype.
        gammas: weights (d,) of the LayerNorms of the stage, in order, at most two; without any, M is the
            identity. The dtype of x, or float32 if x is in half precision.
        backend: "auto" or a backend's name.

    Returns:
        (B, n), in the dtype of gammas. Without gammas the dtype is that of x, or float32 for half precision.

    Raises:
        ValueError, TypeError: shapes or dtypes that don't fit, or a backend that can't run.

    Source: Modarressi et al., 2022, eq. 6 to 10, applied to the residual alone, without the standard
    deviations of the rows.
    """
    op, sizes = "mapped_square", {}
    named = {f"gammas[{index}]": gamma for index, gamma in enumerate(gammas)}
    if len(named) > MAX_NORMS:
        raise ValueError(f"{op}: gammas must have at most {MAX_NORMS} entries, got {len(named)}")
    check_shape(op, "x", x, "B n d", sizes)
    for name, gamma in named.items():
        check_shape(op, name, gamma, "d", sizes)
    check_widened(op, {"x": x}, named)
    return _mapped_square(x, list(gammas), backend)


@register("mapped_square")
def _mapped_square(x: Tensor, gammas: list[Tensor], backend: str) -> Tensor:
    return run("mapped_square", backend, BACKENDS, x, gammas)


@_mapped_square.register_fake
def _(x, gammas, backend):
    return x.new_empty(x.shape[:2], dtype=result_dtype(x, gammas))
