"""Op `add_relevance`: elementwise, five arrays through memory.

pytest benchmarks/bench_add_relevance.py --csv add_relevance
"""

from op_benchmark import suite

bench_add_relevance = suite("add_relevance")
