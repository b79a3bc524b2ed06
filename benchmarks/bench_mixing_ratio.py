"""Op `mixing_ratio`: n d^2 multiply-adds, no pair is visited.

    pytest benchmarks/bench_mixing_ratio.py --csv mixing_ratio
"""

from op_benchmark import cases, run


@cases("mixing_ratio")
def bench_mixing_ratio(benchmark, n, backend):
    run(benchmark, "mixing_ratio", n, backend)
