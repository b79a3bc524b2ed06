"""Attention flow: the maximum flow from a token down to each input token (Abnar and Zuidema, 2020)."""

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import maximum_flow
from torch import Tensor

# The solver of scipy takes integer capacities. The published code rounds them to this fraction.
CAPACITY = 10_000_000


def attention_flow(
    matrices: Tensor, targets: Tensor, key_mask: Tensor | None, layers: bool = False
) -> Tensor:
    """Return the maximum flow from target tokens down to every input token, each row divided by its sum.

    Args:
        matrices: capacities of every layer, (B, L, n, n); row i holds the sources of query i.
        targets: (B, T) int64.
        key_mask: (B, n) bool, True for real tokens, or None.
        layers: whether to also return the flow from the targets of every layer, not of the last one alone.

    Returns:
        (B, L, T, n) in the dtype of matrices, 0 at padding. L is 1 if `layers` is False.

    Source: Abnar and Zuidema, 2020.
    """
    batch, depth, n, _ = matrices.shape
    tops = range(1, depth + 1) if layers else [depth]
    out = torch.zeros(batch, len(tops), targets.shape[1], n, dtype=matrices.dtype, device="cpu")
    for b in range(batch):
        capacities = np.rint(matrices[b].double().cpu().numpy() * CAPACITY).astype(np.int32)
        real = range(n) if key_mask is None else key_mask[b].nonzero()[:, 0].tolist()
        graph = _graph(capacities)
        for t, top in enumerate(tops):
            for index, target in enumerate(targets[b].tolist()):
                flow = [maximum_flow(graph, top * n + target, source).flow_value for source in real]
                out[b, t, index, list(real)] = out.new_tensor(flow)
    return (out / out.sum(-1, keepdim=True)).to(matrices.device)


def _graph(capacities: np.ndarray):
    """Return a csr array with an edge from node (l + 1) * n + i to node l * n + j for each capacity."""
    depth, n, _ = capacities.shape
    layer, i, j = np.nonzero(capacities)
    size = (depth + 1) * n
    edges = (capacities[layer, i, j], ((layer + 1) * n + i, layer * n + j))
    return coo_array(edges, shape=(size, size)).tocsr()
