"""Op `relevance_attention`: relevance through softmax attention, and one step of the rollout of its maps.

For each example and head, with s = R_o / safe(o) and D = q k^T (unscaled):

    alpha[i,j] = exp(scaling D[i,j] - lse[i])                       0 where the key is masked or outside the window
    R_alpha[i,j] = alpha[i,j] <s[i], v[j]> / 2                       R_v[j] = v[j] sum_i alpha[i,j] s[i] / 2
    R'[i,j] = R_alpha[i,j]                                           without additive_mask
    R'[i,j] = c t R_alpha[i,j] / safe(t), t = scaling D[i,j]         with it
    U[i,j] = R'[i,j] / safe(D[i,j])
    R_q[i] = q[i] sum_j U[i,j] k[j] / 2                              R_k[j] = k[j] sum_i U[i,j] q[i] / 2

over all heads of an example:

    c = quotient(quotient(|K|, |K|) * P, K),  P = sum R_alpha,  K = sum t R_alpha / safe(t),  quotient(a, b) = a / safe(b)
    A[i,j] = mean_h max(<grad_o[i], v[j]> R_alpha[i,j], 0)           row_sums[i] = sum_j A[i,j]
    r_out = w (I + A),  w[i] = r[i], or r[i] / (1 + row_sums[i]) with normalize

safe(b) = b + 1e-9, 1e-9 where that is 0; a quotient is 0 where b is 0.
"""

import torch
from torch import Tensor

from pyglobenc.backends.dispatch import pick
from pyglobenc.ops._checks import check_floats, check_mask, check_offsets, check_shape, check_window
from pyglobenc.ops._registered import register

BACKENDS = ("triton", "cuda", "cpu", "reference")


def relevance_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    grad_o: Tensor | None,
    s: Tensor,
    *,
    r: Tensor | None = None,
    key_mask: Tensor | None = None,
    scaling: float | None = None,
    window: tuple[int, int] = (-1, -1),
    additive_mask: bool = False,
    normalize: bool = False,
    stabilizer: float = 0.0,
    offsets: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Relevance of queries, keys and values from that of the attention output, and a rollout step, without an (n, n) array.

    The rules are in this module's docstring.

    Args:
        q, k, v: (B, H, n, dh), float32 or float64.
        lse: log-sum-exp of each query's scaled scores, natural logarithm, (B, H, n), any float dtype.
        grad_o: gradient of the explained logit with respect to the attention output, (B, H, n, dh); None leaves the gradient out:
            A = mean_h max(R_alpha, 0).
        s: relevance of the attention output over safe(that output), (B, H, n, dh).
        r: rows of the rollout down to this layer, (B, T, n), or None.
        key_mask: (B, n) bool, True for real tokens; None: all.
        scaling: factor of q . k, default dh ** -0.5.
        window: keys that query i sees, i - left to i + right; -1 is unlimited; causal is (-1, 0).
        additive_mask: the scores went through BERT's sum with a mask, which is a node of the add rule (its own relevance is 0).
        normalize: divide each row of I + A by its sum in the rollout step.
        stabilizer: 0 for that guard in U; e > 0 divides by D + e * sign(D) instead.
        offsets: of S sequences packed into one, as `rollout_step` takes them: each attends to itself alone, with a factor c of its own.
        backend: "auto" or a backend's name.

    Returns:
        R_q, R_k, R_v (B, H, n, dh), row_sums (B, n), r_out (B, T, n) or None without r; the dtype of q.

    Raises:
        ValueError, TypeError: shapes or dtypes that don't fit, or a backend that can't run.

    Source: Chefer et al., 2021, eq. 7 to 14; the matmul, add and rollout of the published code.
    """
    op = "relevance_attention"
    scaling = check_relevance_args(op, q, k, v, lse, grad_o, s, key_mask, scaling, window)
    args = (q, k, v, lse.to(q.dtype), grad_o, s)
    sizes = {"B": q.shape[0], "n": q.shape[2]}
    check_offsets(op, offsets, key_mask, sizes)
    options = (key_mask, scaling, *window, additive_mask, normalize, float(stabilizer), backend, offsets)
    if r is None:
        return *_relevance_attention(*args, *options), None
    check_shape(op, "r", r, "B T n", sizes)
    check_floats(op, q=q, r=r)
    return _relevance_attention_step(*args, r, *options)


def check_relevance_args(op, q, k, v, lse, grad_o, s, key_mask, scaling, window) -> float:
    """Checks that the relevance ops of attention share; returns scaling, its default filled in."""
    sizes: dict[str, int] = {}
    for name, t in (("q", q), ("k", k), ("v", v), ("grad_o", grad_o), ("s", s)):
        check_shape(op, name, t, "B H n dh", sizes)
    check_shape(op, "lse", lse, "B H n", sizes)
    check_mask(op, key_mask, sizes)
    check_window(op, window)
    check_floats(op, q=q, k=k, v=v, grad_o=grad_o, s=s)
    check_floats(op, lse=lse)
    if q.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: q must be float32 or float64, got {q.dtype}")
    return sizes["dh"] ** -0.5 if scaling is None else float(scaling)


@register("relevance_attention")
def _relevance_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    grad_o: Tensor | None,
    s: Tensor,
    key_mask: Tensor | None,
    scaling: float,
    left: int,
    right: int,
    additive_mask: bool,
    normalize: bool,
    stabilizer: float,
    backend: str,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    args = (q, k, v, lse, grad_o, s, None, key_mask, scaling, (left, right), additive_mask, normalize, stabilizer, offsets)
    return pick("relevance_attention", backend, BACKENDS, args)(*args)[:4]


@_relevance_attention.register_fake
def _(q, k, v, lse, grad_o, s, key_mask, scaling, left, right, additive_mask, normalize, stabilizer, backend, offsets=None):
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[2])


@register("relevance_attention_step")
def _relevance_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    grad_o: Tensor | None,
    s: Tensor,
    r: Tensor,
    key_mask: Tensor | None,
    scaling: float,
    left: int,
    right: int,
    additive_mask: bool,
    normalize: bool,
    stabilizer: float,
    backend: str,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    args = (q, k, v, lse, grad_o, s, r, key_mask, scaling, (left, right), additive_mask, normalize, stabilizer, offsets)
    return pick("relevance_attention", backend, BACKENDS, args)(*args)


@_relevance_attention_step.register_fake
def _(q, k, v, lse, grad_o, s, r, key_mask, scaling, left, right, additive_mask, normalize, stabilizer, backend, offsets=None):
    row_sums = q.new_empty(q.shape[0], q.shape[2])
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape), row_sums, r.new_empty(r.shape)
