"""Relevance through softmax attention in one walk over the pairs: csrc/cpu/relevance_attention.cpp."""

import torch
from torch import Tensor

from pyglobenc.backends.cpu._extension import kernels
from pyglobenc.backends.cpu._extension import relevance_limits as why_not
from pyglobenc.backends.inputs import RelevanceInputs
from pyglobenc.backends.shared.packing import each_run
from pyglobenc.backends.shared.relevance_tiles import rescale_scores

__all__ = ["run", "walk", "why_not"]


def run(inputs: RelevanceInputs, r: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """See `pyglobenc.ops.relevance_attention`.

    Returns R_q, R_k, R_v (B, H, n, dh), row_sums (B, n), and r_out (B, T, n) or None.
    """
    if inputs.cu_seqlens is not None:
        return tuple(each_run(run, inputs, (r,), (2,), (2, 2, 2, 1, 2)))
    # The kernel leaves out masked keys.
    r_q, r_k, r_v = (t.new_zeros(t.shape) for t in (inputs.q, inputs.k, inputs.v))
    row_sums, r_out, sums = walk(inputs, r, (r_q, r_k, r_v))
    if inputs.additive_mask:
        rescale_scores(r_q, r_k, *sums.unbind(1))
    return r_q, r_k, r_v, row_sums, r_out


def walk(
    inputs: RelevanceInputs, r: Tensor | None, out: tuple[Tensor | None, Tensor | None, Tensor | None]
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Run the kernel on inputs that are not packed.

    Args:
        inputs: tensors of the layer.
        r: rows of the rollout, (B, T, n), or None.
        out: zeros (B, H, n, dh) that become R_q and R_k, without the factor of the additive mask, and R_v; or
            None three times.

    Returns:
        row_sums (B, n), r_out (B, T, n) or None, and (B, 2) float64, the sums of R_alpha and of
        t R_alpha / safe(t), which are 0 without out or additive_mask.
    """
    q = inputs.q
    row_sums, sums = q.new_zeros(q.shape[0], q.shape[2]), q.new_zeros(q.shape[0], 2, dtype=torch.float64)
    r_out = None if r is None else r.clone(memory_format=torch.contiguous_format)
    if q.numel():
        given = (q, inputs.k, inputs.v, inputs.lse, inputs.grad_o, inputs.s, inputs.key_mask, r)
        rules = (inputs.scaling, inputs.window, inputs.additive_mask, inputs.normalize, inputs.stabilizer)
        kernels.relevance_attention(given, (*out, row_sums, r_out), *rules, sums, torch.get_num_threads())
    return row_sums, r_out, sums
