"""One entry for each op that has backends: example arguments, and the least operations that it needs.

`pyglobenc doctor`, `pyglobenc bench`, the op benchmarks and the tests all read this table. A new op needs one
entry here.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """Sizes of one call on an encoder layer: B, H, n and dh; d = H * dh."""

    batch: int
    heads: int
    n: int
    dh: int

    @property
    def d(self) -> int:
        """Width of the model."""
        return self.heads * self.dh

    @property
    def tokens(self) -> int:
        """Number of tokens in all examples."""
        return self.batch * self.n

    @property
    def pairs(self) -> int:
        """Number of (query, key) pairs in all examples."""
        return self.batch * self.n * self.n


@dataclass(frozen=True)
class OpEntry:
    """The entry of one op.

    Attributes:
        arguments: returns the op's positional arguments, taken from `pyglobenc.bench.example_inputs.tensors`.
        multiply_adds: returns the number of multiply-adds in one call. Source: the formulas in
            `pyglobenc.backends.reference`, or in `pyglobenc.backends.cpu` if its way needs fewer.
        exponentials: whether each head computes an exponential for every (query, key) pair.
    """

    arguments: Callable[[dict[str, Tensor]], list]
    multiply_adds: Callable[[Shape], float]
    exponentials: bool = False


def _take(*names: str) -> Callable[[dict[str, Tensor]], list[Tensor]]:
    return lambda tensors: [tensors[name] for name in names]


def _pair_norms(s: Shape) -> float:
    # These are the attention scores, and half of the symmetric quadratic form in G.
    return s.pairs * (s.d + s.heads * (s.heads + 1) // 2)


# Rows of a call of `proximity`, which is made for a block of queries at a time.
_ROWS = 64


def _proximity(tensors: dict[str, Tensor]) -> list[Tensor]:
    q, k = (tensors[name].float() for name in ("q", "k"))
    alpha = (q[:, :, :_ROWS] @ k.mT * q.shape[3] ** -0.5).softmax(-1)
    v, weight = tensors["v"], tensors["weight"].float()
    # The attention output is near to the vectors that it is the sum of. A random y is near to none.
    y = torch.einsum("bhtn,bhne,hed->btd", alpha, v.float(), weight)
    return [alpha, v, weight, y]


_RELEVANCE = ("q", "k", "v", "lse", "grad_o", "s")

OP_TABLE: dict[str, OpEntry] = {
    "head_gram": OpEntry(
        _take("v", "kernel", "x", "cross_kernel"),
        # These are the symmetric half of G, and the product with the residual.
        lambda s: s.tokens * s.d * (s.d + s.dh) / 2 + s.tokens * s.d * s.d,
    ),
    "norm_terms": OpEntry(
        lambda tensors: [tensors["v"], tensors["weight"].float(), tensors["x"], [tensors["gamma"]] * 2],
        # These are the vectors, the symmetric half of G, and the products with the residual.
        lambda s: s.tokens * s.d * (s.d + s.heads * (s.heads + 1) / 2 + s.heads),
    ),
    "head_norms": OpEntry(
        _take("v", "weight"),
        # The norms come from the vectors, or from quadratic forms with W_O W_O^T of every head.
        lambda s: min(s.tokens * s.d, (s.tokens + s.d) * s.dh) * s.d,
    ),
    "pair_norms": OpEntry(_take("q", "k", "lse", "gram"), _pair_norms, True),
    "rollout_step": OpEntry(_take("r", "log_scale", "q", "k", "lse", "gram"), _pair_norms, True),
    "mapped_square": OpEntry(lambda tensors: [tensors["x"], [tensors["gamma"]] * 2], lambda s: 0),
    "mixing_ratio": OpEntry(_take("q", "k", "v", "o", "lse", "weight"), lambda s: s.tokens * s.d * s.d),
    "proximity": OpEntry(_proximity, lambda s: s.tokens * s.d * (s.d + s.heads * min(s.n, _ROWS))),
    "relevance_attention": OpEntry(_take(*_RELEVANCE), lambda s: 6 * s.pairs * s.d, True),
    "relevance_maps": OpEntry(_take(*_RELEVANCE), lambda s: 3 * s.pairs * s.d, True),
    "relevance_rollout_step": OpEntry(_take("r", *_RELEVANCE), lambda s: 3 * s.pairs * s.d, True),
    "relevance_product": OpEntry(
        _take("r", "q", "k", "v", "lse", "grad_o"), lambda s: 2 * s.pairs * s.d, True
    ),
    "add_relevance": OpEntry(_take("relevance", "x", "y"), lambda s: 0),
    "clone_relevance": OpEntry(
        lambda tensors: [[tensors["relevance"], tensors["y"]], tensors["x"]], lambda s: 0
    ),
    "linear_relevance": OpEntry(
        lambda tensors: [tensors["relevance"], tensors["x"], tensors["weight"].flatten(0, 1)],
        # This includes the product of the forward pass, which a call of the op alone must repeat.
        lambda s: 4 * s.tokens * s.d * s.d,
    ),
}
