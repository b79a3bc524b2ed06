"""Norms of the decomposed vectors of (query, key) pairs, for all queries or some: csrc/cuda/pair_norms.cu."""

import torch
from torch import Tensor

from pyglobenc.backends.cuda._pairs import pair_reasons, run_pairs
from pyglobenc.backends.inputs import PairInputs


def why_not(inputs: PairInputs, rows: Tensor | None) -> list[str]:
    """Return why these arguments of `pyglobenc.ops.pair_norms` can't run here; empty if they can."""
    return pair_reasons(inputs, rows=rows)


def run(inputs: PairInputs, rows: Tensor | None) -> Tensor:
    """See `pyglobenc.ops.pair_norms`: -> (B, n, n), or (B, T, n) with rows."""
    batch, _, n, _ = inputs.q.shape
    n_queries = n if rows is None else rows.shape[1]
    out = torch.empty(batch, n_queries, n, device=inputs.device)
    if out.numel():
        run_pairs("pair_norms", inputs, (rows, None, None, None), (out, None), n_queries)
    return out
