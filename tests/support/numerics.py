"""The error rule that every backend of every op is held to, and the seed of the tests."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

# Seed of every test. Running the tests with another seed shows that none of them passes by luck.
SEED = int(os.environ.get("PYGLOBENC_TEST_SEED", 0))

# The root mean square of fewer errors is a matter of luck, since results share inputs and so their errors are
# not independent.
ENOUGH = 1000
# Errors that may lie above `factor` times torch's largest. The largest error is luck too, however many there
# are: where errors have heavy tails, one of ours lies above twice torch's largest about once in three times.
# That 11 independent ones do has a chance below 1e-5.
MAX_ABOVE = 10


def assert_as_good_as_torch(out: Tensor, exact: Tensor, torch_out: Tensor, factor: float = 2.0) -> None:
    """Assert the error rule for one result of at least 1,000 numbers; for fewer see `until_enough`, `pooled`.

    The root mean square of the errors of `out` is at most `factor` times that of plain torch, plus half an
    ulp of the largest number. At most 10 errors exceed `factor` times torch's largest error by more than
    that. A single wrong number among N fails unless its error is below sqrt(N) times the allowed root mean
    square.

    Args:
        out: result under test.
        exact: reference in float64 on the same, already rounded inputs.
        torch_out: reference in float32 on the same inputs, cast to the dtype of out.
        factor: above 2 only with a derivation beside the call.
    """
    pool = Pool(factor)
    pool.add(out, exact, torch_out)
    pool.judge()


@dataclass
class Pool:
    """Errors of a result over several draws or cases, each divided by its draw's largest number."""

    factor: float = 2.0
    ours: list[Tensor] = field(default_factory=list)
    torchs: list[Tensor] = field(default_factory=list)
    half_ulp: float = 0.0

    @property
    def size(self) -> int:
        return sum(map(len, self.ours))

    def add(self, out: Tensor, exact: Tensor, torch_out: Tensor) -> None:
        """Add the errors of one draw or case; arguments as for `assert_as_good_as_torch`."""
        assert out.shape == exact.shape, f"shape {tuple(out.shape)}, expected {tuple(exact.shape)}"
        assert torch.isfinite(out).all(), (
            f"{(~torch.isfinite(out)).sum()} of {out.numel()} entries are not finite"
        )
        if not exact.numel():
            return
        # If all exact numbers are 0, an error is infinite.
        largest = exact.abs().max()
        self.ours.append(((out.double() - exact).abs() / largest).nan_to_num(0).flatten().cpu())
        self.torchs.append(((torch_out.double() - exact).abs() / largest).nan_to_num(0).flatten().cpu())
        self.half_ulp = max(self.half_ulp, 0.5 * torch.finfo(out.dtype).eps)

    def judge(self) -> None:
        """Assert the error rule for all errors together."""
        if not self.ours:
            return
        assert self.size >= ENOUGH, (
            f"the error rule needs {ENOUGH} numbers, got {self.size}: draw more, or derive a bound"
        )
        ours, torchs = torch.cat(self.ours), torch.cat(self.torchs)
        rms, allowed = (t.square().mean().sqrt() for t in (ours, torchs))
        of = f"relative to the largest number; half an ulp {self.half_ulp:.1e}, factor {self.factor}"
        assert rms <= self.factor * allowed + self.half_ulp, (
            f"RMS error {rms:.3e}, torch's own {allowed:.3e}, {of}"
        )
        above = int((ours > self.factor * torchs.max() + self.half_ulp).sum())
        assert above <= MAX_ABOVE, (
            f"{above} errors up to {ours.max():.3e} above torch's largest {torchs.max():.3e}, {of}"
        )


def until_enough(factor: float = 2.0) -> Iterator[Callable[..., None]]:
    """Repeat the body of a loop, which draws new inputs, until there are enough numbers for the error rule.

        for compare in until_enough():
            args = draw()
            compare(op(args), exact(args), torch_out(args))

    Each call of compare in the body has its own pool, in the order of the calls. Its arguments are those of
    `assert_as_good_as_torch`.
    """
    pools: list[Pool] = []
    while not pools or any(0 < pool.size < ENOUGH for pool in pools):
        position = count()

        def compare(
            out: Tensor,
            exact: Tensor,
            torch_out: Tensor,
            factor: float = factor,
            position: Iterator[int] = position,
        ) -> None:
            at = next(position)
            if at == len(pools):
                pools.append(Pool(factor))
            pools[at].add(out, exact, torch_out)

        yield compare
        assert pools, "nothing was compared"
    for pool in pools:
        pool.judge()


@contextmanager
def pooled(factor: float = 2.0) -> Iterator[Callable[[Tensor, Tensor, Tensor], None]]:
    """Yield a function compare() for the results of one block; arguments as for `assert_as_good_as_torch`.

    A result of at least 1,000 numbers is judged by itself. Smaller ones are judged together at the end.
    """
    small = Pool(factor)

    def compare(out: Tensor, exact: Tensor, torch_out: Tensor) -> None:
        if exact.numel() >= ENOUGH:
            assert_as_good_as_torch(out, exact, torch_out, factor)
        else:
            small.add(out, exact, torch_out)

    yield compare
    small.judge()


def with_scale(scores: Tensor, log_scale: Tensor, exact_log_scale: Tensor) -> Tensor:
    """Return scores (..., n) times the ratio of their scale (...) to the exact scale.

    The product is one result for the error rule, and is wrong if the scores or the scale are.
    """
    return (scores.double() * (log_scale.double() - exact_log_scale).exp()[..., None]).to(scores.dtype)
