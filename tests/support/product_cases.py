"""Cases of `relevance_product`, and attention probabilities from stored scores."""

from dataclasses import dataclass

import torch
from numerics import pooled
from pair_cases import doubled, key_mask

from pyglobenc.backends.shared.score_mods import SoftCap
from pyglobenc.ops import relevance_product

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Case:
    """Numbers of queries n and keys m, and what hides keys from queries."""

    B: int = 2
    H: int = 2
    Hkv: int = 2
    n: int = 33
    m: int = 33
    dh: int = 16
    T: int = 3
    mask: str = "none"
    window: tuple[int, int] = (-1, -1)


CASES = [
    Case(n=1, m=1, B=8, T=20),
    Case(n=19, m=50, mask="holes"),
    Case(n=65, m=7, dh=24, mask="right"),
    Case(n=1, m=40, T=9),
    Case(n=40, m=1, T=9),
    Case(n=50, m=50, window=(-1, 0), T=1),
    # Queries before the first real key see no key.
    Case(n=50, m=50, window=(-1, 0), mask="left"),
    Case(n=70, m=70, window=(17, 9), mask="holes"),
    Case(n=21, m=34, H=4, Hkv=2, dh=5),
]


def probabilities(args: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Return alpha (B, H, n, m) and the log-sum-exp (B, H, n), from stored scores."""
    q, k, (left, right) = args["q"], args["k"], args["window"]
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * args["scaling"]
    mod = args.get("score_mod")
    if mod is not None:
        scores = mod.cap * torch.tanh(scores / mod.cap) if isinstance(mod, SoftCap) else scores + mod.bias
    n, m = scores.shape[2:]
    ahead = torch.arange(m, device=q.device) - torch.arange(n, device=q.device)[:, None]
    hidden = (ahead > (m if right < 0 else right)) | (-ahead > (n if left < 0 else left))
    if args["key_mask"] is not None:
        hidden = hidden | ~args["key_mask"][:, None, None]
    scores = scores.masked_fill(hidden, -torch.inf)
    # A query that sees no key has an infinite log-sum-exp.
    lse = scores.logsumexp(-1)
    return scores.softmax(-1).nan_to_num(0), lse.masked_fill(lse.isinf(), torch.inf)


def layer(case: Case, dtype: torch.dtype = torch.float32, **changes) -> dict:
    """Return the arguments of the op, without r."""

    def random(heads, n):
        return torch.randn(case.B, n, heads, case.dh, dtype=dtype).transpose(1, 2).to(DEVICE)

    mask = key_mask(case.mask, case.B, case.m)
    args = dict(q=random(case.H, case.n), k=random(case.Hkv, case.m), v=random(case.Hkv, case.m))
    args |= dict(grad_o=random(case.H, case.n), key_mask=mask if mask is None else mask.to(DEVICE))
    args |= dict(scaling=case.dh**-0.5, window=case.window) | changes
    return args | dict(lse=probabilities(doubled(args))[1].to(dtype))


def rows(case: Case, transposed: bool, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(case.B, case.T, case.m if transposed else case.n, dtype=dtype, device=DEVICE)


def check(backend: str, cases: list[Case]) -> None:
    for transposed in (False, True):
        with pooled() as compare:
            for case in cases:
                args, r = layer(case), rows(case, transposed)
                out, plain = (
                    relevance_product(r, **args, transposed=transposed, backend=name)
                    for name in (backend, "reference")
                )
                exact = relevance_product(
                    r.double(), **doubled(args), transposed=transposed, backend="reference"
                )
                compare(out, exact, plain)
