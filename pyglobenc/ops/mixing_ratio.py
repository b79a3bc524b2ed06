"""Op `mixing_ratio`: the share of a token's output that comes from other tokens."""

from torch import Tensor

from pyglobenc.backends.dispatch import run
from pyglobenc.backends.shared.score_mods import ScoreMod
from pyglobenc.ops._checks import check_floats, check_heads, check_shape
from pyglobenc.ops._registered import register

BACKENDS = ("reference",)


def mixing_ratio(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    mapped_weight: Tensor,
    mapped_x: Tensor | None = None,
    *,
    scaling: float | None = None,
    score_mod: ScoreMod | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute the share of each token's output that comes from other tokens.

        ratio[i] = |S[i] - t_ii| / (|S[i] - t_ii| + |t_ii|),   S[i] = sum_j t_ij

    Here t_ij is the decomposed vector of query i and key j, of size d.

    Args:
        q, o: queries and attention output, (B, H, n, dh), any float dtype.
        k, v: keys and values, (B, Hkv, n, dh), the dtype of q.
        lse: log-sum-exp of each query's scaled scores, (B, H, n).
        mapped_weight: W_O[h] M of the stage, (H, dh, d); the arithmetic is done in its dtype.
        mapped_x: x M, (B, n, d), or None for the stage without residual.
        scaling: factor of q . k; the default is dh ** -0.5.
        score_mod: change of the scaled scores before the softmax.
        backend: "auto" or a backend's name.

    Returns:
        Ratios (B, n) in [0, 1], the dtype of mapped_weight. A token that receives nothing from others gets 0.

    Raises:
        ValueError, TypeError: shapes or dtypes that don't fit, or a backend that can't run.

    Source: Kobayashi et al., 2021, eq. 7.
    """
    op, sizes = "mixing_ratio", {}
    check_shape(op, "q", q, "B H n dh", sizes)
    check_shape(op, "o", o, "B H n dh", sizes)
    check_shape(op, "k", k, "B Hkv n dh", sizes)
    check_shape(op, "v", v, "B Hkv n dh", sizes)
    check_heads(op, sizes["H"], sizes["Hkv"])
    check_shape(op, "lse", lse, "B H n", sizes)
    check_shape(op, "mapped_weight", mapped_weight, "H dh d", sizes)
    check_shape(op, "mapped_x", mapped_x, "B n d", sizes, optional=True)
    check_floats(op, q=q, k=k, v=v, o=o)
    check_floats(op, mapped_weight=mapped_weight, mapped_x=mapped_x)
    scaling = sizes["dh"] ** -0.5 if scaling is None else float(scaling)
    args = (q, k, v, o, lse, mapped_weight, mapped_x, scaling)
    if score_mod is not None:
        # torch.library has no type for a score_mod.
        return run(op, backend, BACKENDS, *args, score_mod)
    return _mixing_ratio(*args, backend)


@register("mixing_ratio")
def _mixing_ratio(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    mapped_weight: Tensor,
    mapped_x: Tensor | None,
    scaling: float,
    backend: str,
) -> Tensor:
    return run("mixing_ratio", backend, BACKENDS, q, k, v, o, lse, mapped_weight, mapped_x, scaling)


@_mixing_ratio.register_fake
def _(q, k, v, o, lse, mapped_weight, mapped_x, scaling, backend):
    return mapped_weight.new_empty(q.shape[0], q.shape[2])
