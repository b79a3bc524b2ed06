"""Gram matrices of the heads' transformed vectors, from the values and matrices of the weights.

    G[j][h, h'] = v[h, j] K[h, h'] v[h', j]^T,   K[h, h'] = (W_O[h] M) (W_O[h'] M)^T
    c[i][h]     = v[h, i] P[h] x[i]^T,           P[h]     = W_O[h] M M^T

No transformed vector is formed. Since G is symmetric, it takes n*d^2/2 multiply-adds. The cross terms c take
n*d^2, and the memory at a time is n*d floats.
"""

from torch import Tensor

from pyglobenc.backends.reference.stage_map import stage_map, stage_map_transposed


def gram_weights(weight: Tensor, gammas: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Compute the matrices K and P of `head_gram`, which depend on the layer's weights alone.

    Args:
        weight: W_O by head, (H, dh, d).
        gammas: LayerNorm weights (d,) of the stage, in order.

    Returns:
        K (H, dh, H, dh) and P (H, dh, d), contiguous, because kernels read their rows.

    Source: Modarressi et al., 2022, eq. 6 to 10, with the square expanded over heads.
    """
    mapped = stage_map(weight, gammas)
    rows = mapped.flatten(0, 1)
    kernel = (rows @ rows.T).view(*weight.shape[:2], *weight.shape[:2])
    return kernel, stage_map_transposed(mapped, gammas).contiguous()


def run(
    v: Tensor, kernel: Tensor, x: Tensor | None = None, cross_kernel: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """See `pyglobenc.ops.head_gram`: -> G (B, n, H, H), c (B, n, H) or None."""
    n_heads, dh = kernel.shape[:2]
    v = (
        v.to(kernel.dtype).repeat_interleave(n_heads // v.shape[1], dim=1).transpose(1, 2).contiguous()
    )  # (B, n, H, dh)
    gram = v.new_empty(*v.shape[:3], n_heads)
    for h in range(n_heads):
        mixed = v[:, :, h] @ kernel[h, :, h:].reshape(dh, -1)
        products = (mixed.view(*v.shape[:2], -1, dh) * v[:, :, h:]).sum(-1)
        gram[:, :, h, h:] = products
        gram[:, :, h:, h] = products
    if x is None:
        return gram, None
    projected = x.to(kernel.dtype) @ cross_kernel.flatten(0, 1).T
    return gram, (projected.view_as(v) * v).sum(-1)
