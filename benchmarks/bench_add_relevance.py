"""Op `add_relevance`: elementwise, five arrays through memory.

    pytest benchmarks/bench_add_relevance.py --csv add_relevance
"""

from op_benchmark import cases, run


@cases("add_relevance")
def bench_add_relevance(benchmark, n, backend):
    run(benchmark, "add_relevance", n, backend)
