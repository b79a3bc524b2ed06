"""Op `clone_relevance`: elementwise, four arrays through memory.

    pytest benchmarks/bench_clone_relevance.py --csv clone_relevance
"""

from op_benchmark import cases, run


@cases("clone_relevance")
def bench_clone_relevance(benchmark, n, backend):
    run(benchmark, "clone_relevance", n, backend)
