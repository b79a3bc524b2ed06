"""Op `linear_relevance`: relevance through a Linear layer; materialised: the published code with its clamped
copies of x and W.

    pytest benchmarks/bench_linear_relevance.py --csv linear_relevance
"""

from op_benchmark import D, suite
from torch.nn.functional import linear

from pyglobenc.backends.shared.safe_division import safe_divide


def materialised(r, x, weight):
    x_plus, x_minus, w_plus, w_minus = (
        x.clamp(min=0),
        x.clamp(max=0),
        weight.clamp(min=0),
        weight.clamp(max=0),
    )
    s = safe_divide(r, linear(x_plus, w_plus) + linear(x_minus, w_minus))
    return x_plus * (s @ w_plus) + x_minus * (s @ w_minus)


bench_linear_relevance = suite(
    "linear_relevance", materialised, lambda batch, n: 5 * batch * n * D + 2 * D * D
)
