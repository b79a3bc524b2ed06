"""Random arguments of the relevance ops of attention, and their map computed from materialised arrays."""

import torch
from direct import attention_probabilities
from pair_cases import Case, key_mask

from pyglobenc.ops import attention


def inputs(case: Case, dtype: torch.dtype = torch.float32) -> dict:
    """Return the arguments that the three ops share.

    q . k stays away from 0, because R / safe(q . k) amplifies its rounding without bound.
    """
    B, H, n, dh = case.B, case.H, case.n, case.dh
    q, k, v, grad_o, s = (torch.randn(B, n, H, dh, dtype=dtype).transpose(1, 2) for _ in range(5))
    q, k = q.abs() + 0.1, k.abs() + 0.1
    seen = dict(key_mask=key_mask(case.mask, B, n), scaling=dh**-0.5, window=case.window)
    # A query that sees no key has lse = inf.
    _, lse = attention(q.double(), k.double(), v.double(), **seen)
    return dict(q=q, k=k, v=v, lse=lse.to(dtype), grad_o=grad_o, s=s, **seen)


def exact_map(args: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return alpha and R_alpha, (B, H, n, n), and A = mean_h max(<grad_o, v> R_alpha, 0), (B, n, n)."""
    alpha = attention_probabilities(args["q"], args["k"], args["key_mask"], args["scaling"], args["window"])
    relevance = alpha * (args["s"] @ args["v"].mT) / 2
    gradient = 1 if args["grad_o"] is None else args["grad_o"] @ args["v"].mT
    return alpha, relevance, (gradient * relevance).clamp(min=0).mean(1)
