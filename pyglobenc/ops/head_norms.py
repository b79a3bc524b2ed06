"""Op `head_norms`: norms of every head's transformed vectors."""

from torch import Tensor

from pyglobenc.backends.dispatch import run
from pyglobenc.ops._checks import check_floats, check_heads, check_shape
from pyglobenc.ops._registered import register

BACKENDS = ("triton", "cuda", "cpu", "reference")


def head_norms(v: Tensor, weight: Tensor, *, backend: str = "auto") -> Tensor:
    """Compute the norm of f[h, j] = v[h, j] W_O[h] for every head and token.

    The published `head_N` map is `alpha[h, i, j] * norm[j, h]`.

    Args:
        v: values with their bias, (B, Hkv, n, dh), any float dtype.
        weight: W_O by head, (H, dh, d), the dtype of v; H is a multiple of Hkv.
        backend: "auto" or a backend's name.

    Returns:
        Norms (B, n, H), the dtype of v.

    Raises:
        ValueError, TypeError: shapes or dtypes that don't fit, or a backend that can't run.

    Source: Kobayashi et al., 2020, eq. 5.
    """
    sizes: dict[str, int] = {}
    check_shape("head_norms", "v", v, "B Hkv n dh", sizes)
    check_shape("head_norms", "weight", weight, "H dh d", sizes)
    check_heads("head_norms", sizes["H"], sizes["Hkv"])
    check_floats("head_norms", v=v, weight=weight)
    return _head_norms(v, weight, backend)


@register("head_norms")
def _head_norms(v: Tensor, weight: Tensor, backend: str) -> Tensor:
    return run("head_norms", backend, BACKENDS, v, weight)


@_head_norms.register_fake
def _(v, weight, backend):
    return v.new_empty(v.shape[0], v.shape[2], weight.shape[0])
