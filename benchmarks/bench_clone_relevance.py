"""Op `clone_relevance`: elementwise, four arrays through memory.

pytest benchmarks/bench_clone_relevance.py --csv clone_relevance
"""

from op_benchmark import suite

bench_clone_relevance = suite("clone_relevance")
