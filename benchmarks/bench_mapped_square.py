"""Op `mapped_square`: one read of the residual, two LayerNorms' weights.

pytest benchmarks/bench_mapped_square.py --csv mapped_square
"""

from op_benchmark import suite

bench_mapped_square = suite("mapped_square")
