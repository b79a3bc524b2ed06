"""Op `proximity`: how much closer the heads' vectors of a key bring a row's sum to its value, in L1."""

from torch import Tensor

from pyglobenc.backends.dispatch import run
from pyglobenc.ops._checks import check_floats, check_heads, check_shape, check_widened
from pyglobenc.ops._registered import register

BACKENDS = ("triton", "cuda", "cpu", "reference")


def proximity(
    alpha: Tensor, v: Tensor, weight: Tensor, y: Tensor, *, per_head: bool = False, backend: str = "auto"
) -> Tensor:
    """Compute the L1 proximity of each key's vectors to the values of T rows.

        p[t, j]    = max(0, |y[t]|_1 - |y[t] - sum_h alpha[h, t, j] f[h, j]|_1),   f[h, j] = v[h, j] W_O[h]
        p[h, t, j] = max(0, |y[t]|_1 - |y[t] - alpha[h, t, j] f[h, j]|_1)          with per_head

    The vectors f exist for a block of keys at a time, and no array has B*T*n*d entries. An exact L1 distance
    has no quadratic form, so the op takes T*n*d*H multiply-adds, and n*d^2 for f.

    Args:
        alpha: factor of each head's vector in each row, (B, H, T, n), the dtype of weight. For rows of
            attention these are the probabilities.
        v: values with their bias, (B, Hkv, n, dh), any float dtype.
        weight: W_O by head, (H, dh, d); the dtype of v, or float32 where that is half precision.
        y: values of the rows, (B, T, d), the dtype of weight.
        per_head: whether each head's vector is compared alone.
        backend: "auto" or a backend's name.

    Returns:
        (B, T, n), or (B, H, T, n) with per_head, in the dtype of weight. Keys whose factors are all 0 get 0.

    Raises:
        ValueError, TypeError: shapes or dtypes that don't fit, or a backend that can't run.

    Source: Ferrando et al., 2022 (ALTI); with per_head Ferrando and Voita, 2024 (information flow routes).
    """
    op, sizes = "proximity", {}
    check_shape(op, "alpha", alpha, "B H T n", sizes)
    check_shape(op, "v", v, "B Hkv n dh", sizes)
    check_shape(op, "weight", weight, "H dh d", sizes)
    check_shape(op, "y", y, "B T d", sizes)
    check_heads(op, sizes["H"], sizes["Hkv"])
    check_floats(op, alpha=alpha, weight=weight, y=y)
    check_widened(op, {"v": v}, {"weight": weight})
    return _proximity(alpha, v, weight, y, bool(per_head), backend)


@register("proximity")
def _proximity(alpha: Tensor, v: Tensor, weight: Tensor, y: Tensor, per_head: bool, backend: str) -> Tensor:
    return run("proximity", backend, BACKENDS, alpha, v, weight, y, per_head)


@_proximity.register_fake
def _(alpha, v, weight, y, per_head, backend):
    batch, heads, rows, n = alpha.shape
    return weight.new_empty((batch, heads, rows, n) if per_head else (batch, rows, n))
