"""What the device reaches at best: torch's matrix product in each dtype, exponentials, and a copy.

pytest benchmarks/bench_ceilings.py --csv ceilings
"""

import pytest
import torch
from measure import DEVICE
from op_benchmark import DTYPES, SLOW, ceilings


@pytest.mark.parametrize("dtype", DTYPES)
def bench_ceilings(benchmark, dtype):
    if (DEVICE.type, getattr(torch, dtype)) == SLOW:
        pytest.skip("torch's float16 products run at 1 to 2 GFLOP/s on a CPU")
    found = ceilings(DEVICE, getattr(torch, dtype))
    rates = {"gemm_flops": found.flops, "exp_rate": found.exps, "copy_bytes": found.bytes}
    benchmark.extra_info.update({name: f"{rate:.6g}" for name, rate in rates.items()})
    benchmark.pedantic(lambda: None, rounds=1, iterations=1)
