"""Op `relevance_attention`: relevance through softmax attention, and one step of the rollout of its maps.

For each example and head, with s = R_o / safe(o) and D = q k^T (unscaled):

    alpha[i,j]   = exp(scaling D[i,j] - lse[i]), and 0 where the key is masked or outside the window
    R_alpha[i,j] = alpha[i,j] <s[i], v[j]> / 2
    R_v[j]       = v[j] sum_i alpha[i,j] s[i] / 2
    R'[i,j]      = R_alpha[i,j]                                without additive_mask
    R'[i,j]      = c t R_alpha[i,j] / safe(t), t = scaling D[i,j]    with additive_mask
    U[i,j]       = R'[i,j] / safe(D[i,j])
    R_q[i]       = q[i] sum_j U[i,j] k[j] / 2
    R_k[j]       = k[j] sum_i U[i,j] q[i] / 2

Over all heads of an example, with quotient(a, b) = a / safe(b):

    P           = sum R_alpha
    K           = sum t R_alpha / safe(t)
    c           = quotient(quotient(|K|, |K|) * P, K)
    A[i,j]      = mean_h max(<grad_o[i], v[j]> R_alpha[i,j], 0)
    row_sums[i] = sum_j A[i,j]
    r_out       = w (I + A), with w[i] = r[i], or w[i] = r[i] / (1 + row_sums[i]) with normalize

safe(b) = b + 1e-9, 1e-9 where that is 0; a quotient is 0 where b is 0.
"""

from torch import Tensor

from pyglobenc.backends.dispatch import run
from pyglobenc.backends.inputs import RelevanceInputs
from pyglobenc.ops._inputs import check_rollout, relevance_inputs
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
    rescale: bool = True,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Propagate relevance from the attention output to queries, keys and values, and take a rollout step.

    This module's docstring gives the rules. No (n, n) array is stored.

    Args:
        q, k, v, lse, grad_o, s: fields of `pyglobenc.backends.inputs.RelevanceInputs`, which gives their
            shapes. lse may have any float dtype.
        key_mask, scaling, window, additive_mask: more fields; scaling None means dh ** -0.5.
        normalize, stabilizer, rescale, cu_seqlens: more fields.
        r: rows of the rollout of the layers above, (B, T, n), or None.
        backend: "auto" or a backend's name.

    Returns:
        R_q, R_k and R_v (B, H, n, dh), row_sums (B, n), and r_out (B, T, n) or None without r. They have the
        dtype of q.

    Raises:
        ValueError, TypeError: shapes or dtypes that don't fit, or a backend that can't run.

    Source: Chefer et al., 2021, eq. 7 to 14; the matmul, add and rollout of the published code.
    """
    op = "relevance_attention"
    layer = dict(
        q=q,
        k=k,
        v=v,
        lse=lse,
        grad_o=grad_o,
        s=s,
        key_mask=key_mask,
        scaling=scaling,
        window=window,
        cu_seqlens=cu_seqlens,
    )
    rules = dict(
        additive_mask=additive_mask, normalize=normalize, stabilizer=float(stabilizer), rescale=rescale
    )
    inputs = relevance_inputs(op, **layer, **rules)
    if r is None:
        return *_relevance_attention(inputs, backend), None
    check_rollout(op, r, q, inputs)
    return _relevance_attention_step(inputs, r, backend)


@register("relevance_attention", "str backend) -> (Tensor, Tensor, Tensor, Tensor)", RelevanceInputs)
def _relevance_attention(inputs: RelevanceInputs, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return run("relevance_attention", backend, BACKENDS, inputs, None)[:4]


@_relevance_attention.register_fake
def _(inputs, backend):
    q = inputs.q
    return (
        q.new_empty(q.shape),
        q.new_empty(q.shape),
        q.new_empty(q.shape),
        q.new_empty(q.shape[0], q.shape[2]),
    )


@register(
    "relevance_attention_step",
    "Tensor r, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    RelevanceInputs,
)
def _relevance_attention_step(inputs: RelevanceInputs, r: Tensor, backend: str) -> tuple[Tensor, ...]:
    return run("relevance_attention", backend, BACKENDS, inputs, r)


@_relevance_attention_step.register_fake
def _(inputs, r, backend):
    q = inputs.q
    row_sums = q.new_empty(q.shape[0], q.shape[2])
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape), row_sums, r.new_empty(r.shape)
