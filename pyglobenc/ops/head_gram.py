"""Op `head_gram`: per-token Gram matrices of the heads' transformed vectors."""

from torch import Tensor

from pyglobenc.backends.dispatch import run
from pyglobenc.backends.reference.head_gram import gram_weights
from pyglobenc.ops._checks import check_heads, check_shape, check_widened
from pyglobenc.ops._registered import register

__all__ = ["gram_weights", "head_gram"]

BACKENDS = ("triton", "cuda", "cpu", "reference")


def head_gram(
    v: Tensor,
    kernel: Tensor,
    x: Tensor | None = None,
    cross_kernel: Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Compute each token's Gram matrix over heads, and the products of its heads with the residual.

        G[j][h, h'] = <f[h, j] M, f[h', j] M>        c[i][h] = <f[h, i] M, x[i] M>

    with f[h, j] = v[h, j] W_O[h] and M the matrix of the stage. Nothing of size n*H*d is formed.

    Args:
        v: values with their bias, (B, Hkv, n, dh), any float dtype.
        kernel: (W_O[h] M)(W_O[h'] M)^T of `gram_weights`, (H, dh, H, dh); the dtype of v, or float32 where
            that is half precision.
        x: residual input of the layer, (B, n, d), the dtype of v, or None for a stage without it.
        cross_kernel: W_O M M^T of `gram_weights`, (H, dh, d), the dtype of kernel; given together with x.
        backend: "auto" or a backend's name.

    Returns:
        G (B, n, H, H) and c (B, n, H), or None without x; the dtype of kernel.

    Raises:
        ValueError, TypeError: shapes or dtypes that don't fit, or a backend that can't run.

    Source: Modarressi et al., 2022, eq. 6 to 10, with the square expanded over heads.
    """
    op, sizes = "head_gram", {}
    check_shape(op, "v", v, "B Hkv n dh", sizes)
    check_shape(op, "kernel", kernel, "H dh H dh", sizes)
    check_shape(op, "x", x, "B n d", sizes, optional=True)
    check_shape(op, "cross_kernel", cross_kernel, "H dh d", sizes, optional=True)
    check_heads(op, sizes["H"], sizes["Hkv"])
    check_widened(op, {"v": v, "x": x}, {"kernel": kernel, "cross_kernel": cross_kernel})
    if (x is None) != (cross_kernel is None):
        raise ValueError(f"{op}: x and cross_kernel must be given together")
    if x is None:
        return _head_gram(v, kernel, backend), None
    return _head_gram_cross(v, kernel, x, cross_kernel, backend)


@register("head_gram")
def _head_gram(v: Tensor, kernel: Tensor, backend: str) -> Tensor:
    return run("head_gram", backend, BACKENDS, v, kernel)[0]


@_head_gram.register_fake
def _(v, kernel, backend):
    return kernel.new_empty(v.shape[0], v.shape[2], kernel.shape[0], kernel.shape[0])


@register("head_gram_cross")
def _head_gram_cross(
    v: Tensor, kernel: Tensor, x: Tensor, cross_kernel: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return run("head_gram", backend, BACKENDS, v, kernel, x, cross_kernel)


@_head_gram_cross.register_fake
def _(v, kernel, x, cross_kernel, backend):
    gram = kernel.new_empty(v.shape[0], v.shape[2], kernel.shape[0], kernel.shape[0])
    return gram, kernel.new_empty(v.shape[0], v.shape[2], kernel.shape[0])
