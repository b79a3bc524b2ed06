"""Inputs of `pair_norms` and `rollout_step`, and the backends that they are tested on."""

import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

from pyglobenc.backends.dispatch import load
from pyglobenc.backends.reference.stage_map import stage_map
from pyglobenc.backends.shared.packing import per_token
from pyglobenc.bench.costs import flatten
from pyglobenc.ops import gram_weights, head_gram, pair_norms, rollout_step
from pyglobenc.ops.attention import attention

SETS = ("amx", "avx512bf16", "avx512", "avx2", "portable")


def cpu_params():
    """Return one parameter for each instruction set, the fastest first; those that can't run are skipped.

    If the module can't be loaded, return one parameter that is skipped with the reason.
    """
    module, reason = load("pair_norms", "cpu")
    if module is None:
        return [pytest.param("cpu", marks=pytest.mark.skip(reason=reason))]
    here = module.kernels.instruction_sets()
    missing = [name for name in SETS if name not in here]
    skip = [pytest.mark.skip(reason="not built, or not an instruction set of this machine")]
    return [pytest.param(f"cpu-{name}") for name in here] + [
        pytest.param(f"cpu-{name}", marks=skip) for name in missing
    ]


KERNELS = cpu_params()


@contextmanager
def running(kernel: str):
    """Yield the backend's name of a parameter such as "cpu-avx2", while that instruction set is in use."""
    backend, _, name = kernel.partition("-")
    if not name:
        yield backend
        return
    module = load("pair_norms", backend)[0].kernels
    before = module.instruction_set()
    module.use(name)
    try:
        yield backend
    finally:
        module.use(before)


def factor(kernel: str) -> float:
    """Return the factor of the error rule: 2, or 4 for the portable build.

    The portable build has no fused multiply-add, so it rounds every step twice.
    """
    return 4.0 if kernel == "cpu-portable" else 2.0


@dataclass(frozen=True)
class Case:
    """Shape of a layer, and what hides keys from its queries."""

    B: int = 2
    H: int = 4
    Hkv: int = 4
    n: int = 33
    dh: int = 8
    d: int = 24
    mask: str = "none"
    window: tuple[int, int] = (-1, -1)
    residual: bool = True
    norms: int = 2
    dtype: torch.dtype = torch.float32
    peak: float = 1.0  # factor of the scores

    def __str__(self):
        text = f"B{self.B}-H{self.H}.{self.Hkv}-n{self.n}-dh{self.dh}-{self.mask}"
        text += f"-{self.window[0]}.{self.window[1]}-{'res' if self.residual else 'plain'}{self.norms}"
        text += f"-{str(self.dtype)[6:]}"
        return text if self.peak == 1.0 else f"{text}-peak{self.peak:g}"


def key_mask(kind: str, B: int, n: int):
    """Return a mask (B, n) bool for padding of the kind right, left, holes or single; None for "none"."""
    if kind == "none":
        return None
    real = torch.randint(1, n + 1, (B, 1))
    if kind == "right":
        return torch.arange(n) < real
    if kind == "left":
        return torch.arange(n) >= n - real
    if kind == "single":
        return torch.arange(n) == real - 1
    mask = torch.rand(B, n) < 0.6
    mask[:, n // 2] = True
    return mask


def layer(case: Case) -> dict:
    """Return random tensors of a layer in float64; q and k are rounded to the case's dtype."""
    B, H, Hkv, n, dh, d = case.B, case.H, case.Hkv, case.n, case.dh, case.d
    make = dict(dtype=torch.float64)
    q = (torch.randn(B, n, H, dh, **make) * case.peak).transpose(1, 2).to(case.dtype)
    k = torch.randn(B, n, Hkv, dh, **make).transpose(1, 2).to(case.dtype)
    v = torch.randn(B, n, Hkv, dh, **make).transpose(1, 2)
    gammas = [torch.rand(d, **make) + 0.5 for _ in range(case.norms)]
    weight = torch.randn(H, dh, d, **make) / d**0.5
    rstd = torch.rand(B, n, **make) + 0.5 if case.norms else None
    seen = dict(key_mask=key_mask(case.mask, B, n), scaling=dh**-0.5, window=case.window)
    return dict(
        q=q, k=k, v=v, x=torch.randn(B, n, d, **make), weight=weight, gammas=gammas, rstd=rstd, **seen
    )


def pair_args(case: Case, made: dict | None = None) -> dict:
    """Return keyword arguments of `pair_norms` for a random layer, or for the one given.

    They are rounded to float32, but q and k are rounded to the case's dtype.
    """
    t = layer(case) if made is None else made
    seen = {name: t[name] for name in ("key_mask", "scaling", "window")}
    _, lse = attention(t["q"].double(), t["k"].double(), t["v"], **seen)
    kernel, cross_kernel = gram_weights(t["weight"], t["gammas"])
    gram, cross = head_gram(t["v"], kernel, t["x"], cross_kernel, backend="reference")
    residual_sq = stage_map(t["x"], t["gammas"]).square().sum(-1)
    single = dict(lse=lse, gram=gram, rstd=t["rstd"])
    if case.residual:
        single |= dict(cross=cross, residual_sq=residual_sq)
    return dict(
        q=t["q"], k=t["k"], **{name: s if s is None else s.float() for name, s in single.items()}, **seen
    )


def check_huge_squares(backend: str, device: str = "cpu") -> None:
    """Check `pair_norms` and `rollout_step` where sums of finite terms of both signs overflow float32.

    The norms themselves don't. A result is right to float32's sums, or it isn't finite. The largest terms are
    as large as float32's largest number, and each sum has fewer than 64 of them.
    """
    for _ in range(4):
        given = pair_args(Case(B=4, n=17)) | dict(rstd=None)
        f = torch.randn(4, 17, 1, 24, dtype=torch.float64)
        # The sums of the last example do not overflow.
        f *= torch.tensor([3e38, 3e38, 3e38, 3e37])[:, None, None, None].sqrt() / f.norm(dim=-1, keepdim=True)
        # Two heads and the residual point in opposite directions, so that their products are negative.
        shares = torch.tensor([1, -1, 0.01, -0.01])[:, None] * (1 - torch.rand(4, 17, 4, 1).double() / 4)
        f, x = f * shares, -f
        given |= dict(gram=f @ f.mT, cross=(f @ x.mT)[..., 0], residual_sq=x.square().sum((2, 3)))
        # Several heads attend to the same key.
        given |= dict(q=given["q"] * 0, lse=torch.rand_like(given["lse"]) * 3)
        tensors = {name: t for name, t in given.items() if isinstance(t, torch.Tensor)}
        given |= {name: t.float().to(device) for name, t in tensors.items()}
        exact, found = pair_norms(**doubled(given), backend="reference"), pair_norms(**given, backend=backend)
        kept = found.isfinite()
        assert kept[-1].all() and not kept.all()
        assert ((found.double().square() - exact.square())[kept].abs() <= 64 * 2.0**-24 * 3e38).all()
        rows, scale = torch.rand(4, 2, 17, device=device), torch.zeros(4, 2, device=device)
        rows, _ = rollout_step(rows, scale, **given, backend=backend)
        # A row's largest entry scales all of them.
        assert not rows[~kept.flatten(1).all(1)].isfinite().all(-1).any()


def doubled(args: dict) -> dict:
    """Return the same arguments with every floating-point tensor in float64."""
    return {
        name: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for name, t in args.items()
    }


def spread(t: torch.Tensor) -> torch.Tensor:
    """Return the same numbers, with every second place in memory between them unused."""
    return torch.stack([t, t], -1)[..., 0]


def spread_all(args: dict) -> dict:
    """Return the same arguments with every tensor spread."""
    return {name: spread(t) if isinstance(t, torch.Tensor) else t for name, t in args.items()}


def with_dirty_padding(args: dict) -> dict:
    """Return the same arguments with NaN at padding."""
    padded = ~args["key_mask"]
    dirty = {name: t.clone() if isinstance(t, torch.Tensor) else t for name, t in args.items()}
    for name in ("q", "k", "lse"):
        dirty[name].transpose(1, 2)[padded] = torch.nan
    for name in ("gram", "cross", "residual_sq", "rstd"):
        dirty[name][padded] = torch.nan
    return dirty


def alone(args: dict, b: int, count: int) -> dict:
    """Return the arguments of example b alone, with its first `count` tokens and without a mask."""
    return {
        name: t[b : b + 1].narrow(2 if name in ("q", "k", "lse") else 1, 0, count)
        if isinstance(t, torch.Tensor)
        else t
        for name, t in args.items()
    } | dict(key_mask=None)


def assert_threads_change_nothing(kernel: str, call: Callable[[str], object]) -> None:
    """Assert that call(backend) returns equal tensors with 1, 2 and 3 threads."""
    before, results = torch.get_num_threads(), []
    with running(kernel) as backend:
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(list(flatten(call(backend))))
        finally:
            torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))


def product(
    r: torch.Tensor, args: dict, backend: str, cu_seqlens: torch.Tensor | None = None, top: float = 1.0
) -> torch.Tensor:
    """Return r @ norms in the dtype of r, from the rows of `rollout_step` and their scales.

    top: the approximate largest entry. r is scaled by it so that log_scale is near 0, where rounding is
    small.
    """
    unit = 2.0 ** -math.frexp(top)[1]
    size = len(r) if cu_seqlens is None else len(cu_seqlens) - 1
    out, scale = rollout_step(
        r * unit, r.new_zeros(size, r.shape[1]), **args, cu_seqlens=cu_seqlens, backend=backend
    )
    back = scale.double().exp() / unit
    return (out * (back[..., None] if cu_seqlens is None else per_token(back, cu_seqlens))).to(r.dtype)
