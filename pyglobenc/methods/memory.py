"""Memory of an attribution before it runs, from the model's config and the batch's shape.

The rollout family's peak is one of three moments: the MLP of the forward pass's last layer, the norm after
it, or a layer of the rollout; everything saved for the rollout is there at each. Of the methods that explain
a class it is the way down: the graph that autograd keeps of every layer and the relevance beside it. Sizes
are a tensor's numbers a token (d, the MLP's width, H...) times the tokens of the batch, B*n.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from pyglobenc.backends.shared.relevance_tiles import MIN_QUERIES, TILE_FLOATS
from pyglobenc.methods.precision.reliability import measured
from pyglobenc.methods.rollout.baselines import METHODS as ROLLOUT_FAMILY
from pyglobenc.methods.rollout.baselines import OF_STAGE

# reads the whole map of every layer, and makes numpy and scipy hold so many bytes an entry of one example's
FLOW, EDGE = "attention-flow", 64
FLOAT32, FLOAT64 = 4, 8
RELEVANCE = ("transformer-attribution", "lrp", "partial-lrp", "attention-gradcam")
ESTIMATED = (*ROLLOUT_FAMILY, *RELEVANCE)
# tiles of (query, key) pairs that the relevance ops hold, and numbers in them all at most: the CPU kernels,
# and the reference in double
TILES = {FLOAT32: (4, 1 << 20), FLOAT64: (8, 3 << 20)}


@dataclass(frozen=True)
class Estimate:
    """Bytes that an attribution takes, by what they hold; `peak` is their sum.

    Attributes:
        weights: the model's parameters and buffers, which are there before the call.
        kernels: what is made of the weights of one layer at a time: W_O with the norms, or |W| of one Linear.
        saved: hidden states, queries, keys, values, outputs and statistics of every layer.
        workspace: the largest temporary tensors that exist at one time.
        maps: (n, n) arrays; 0 in row mode.
    """

    weights: int
    kernels: int
    saved: int
    workspace: int
    maps: int

    @property
    def peak(self) -> int:
        return self.weights + self.kernels + self.saved + self.workspace + self.maps

    def __str__(self) -> str:
        names = {
            "weights": "weights",
            "kernels": "made of them",
            "saved": "layers",
            "workspace": "workspace",
            "maps": "maps",
        }
        listed = ", ".join(
            f"{text} {_readable(size)}" for name, text in names.items() if (size := getattr(self, name))
        )
        return f"{_readable(self.peak)} ({listed})"


def _readable(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def estimate_memory(
    model: PreTrainedModel,
    *,
    batch: int,
    n: int,
    method: str = "globenc",
    targets: int = 1,
    layers: bool = False,
    maps: int = 0,
    dtype: torch.dtype | None = None,
) -> Estimate:
    """Peak memory of a call of a method.

    Args:
        model: of transformers; one on torch's meta device will do, whose weights take no memory.
        batch: B, examples at a time.
        n: tokens of the longest, special tokens included.
        method: a name in ESTIMATED.
        targets: T, rows an example.
        layers: the result holds the rollout up to every layer.
        maps: (B, L, n, n) arrays asked for; a head_N counts as the number of heads.
        dtype: of the attribution's arithmetic, as for `GlobEnc`.

    targets, layers and maps are of the rollout family alone.

    Returns:
        Estimate, in bytes.

    Raises:
        ValueError: a method that no estimate is known for.
    """
    if method not in ESTIMATED:
        raise ValueError(f"estimate_memory: known for {', '.join(ESTIMATED)}, got {method!r}")
    s, element = _Sizes.of(model.config), torch.empty((), dtype=model.dtype).element_size()
    wide = FLOAT64 if FLOAT64 in (element, dtype and torch.empty((), dtype=dtype).element_size()) else FLOAT32
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    if method in RELEVANCE:
        return _relevance(
            s, method, weights, batch, n, element if dtype is None else wide, wide, model.device
        )
    tokens = batch * n
    # asked for in double, the states of a narrower model are cast before the rollout
    state = wide if dtype == torch.float64 else element
    forward = max(2 * s.mlp + s.d, s.mlp + 4 * s.d) * element
    rollout = (_rollout_numbers(s, method) + (2 * s.d if element < wide else 0)) * wide
    rows = 3 * batch * targets * n * (s.layers if layers else 1) * wide
    workspace, entries = max(tokens * forward, tokens * rollout + rows), s.layers * n * n
    # the layers' own maps, and the array that they are stacked into
    stored = 2 * maps * batch * entries * wide
    if method == FLOW:
        stored += batch * entries * wide
        workspace = max(workspace + batch * entries * wide, EDGE * entries)
    return Estimate(
        weights=weights,
        kernels=_kernel_numbers(s, method, model.device) * wide,
        saved=s.layers * tokens * ((2 * s.d + s.queries + 2 * s.keys) * state + (s.heads + 4) * wide),
        workspace=workspace,
        maps=stored,
    )


def _relevance(
    s: "_Sizes", method: str, weights: int, batch: int, n: int, element: int, wide: int, device: torch.device
) -> Estimate:
    """Of the methods that explain a class: numbers that autograd and the rules keep, as the allocator shows
    them.
    """
    matrices = s.layers * 2 * (s.d * s.queries + s.d * s.keys + s.d * s.mlp)
    rules, gradient = method != "attention-gradcam", method == "transformer-attribution"
    # a small model's error is measured by a second run beside the first
    if rules and wide == FLOAT32 and measured(matrices * batch * n, device):
        batch *= 2
    tokens, (tiles, most) = batch * n, TILES[wide]
    pairs = batch * s.heads * n * n
    # of the tile at work, and of the one before it
    tile = min(pairs, max(TILE_FLOATS, MIN_QUERIES * batch * s.heads * n))
    before = min(tile, pairs - tile)
    states = 4 * s.d + s.queries + s.keys + 2 * s.mlp
    # what autograd keeps beside them, less where the gradient's way back through all layers has freed it
    saved = states + (3 * s.d if gradient else 4 * s.d)
    # of the clamped copies of an MLP's weights
    clamped = tokens * (2 * s.d + 4.5 * s.mlp) + 2 * s.d * s.mlp
    workspace = {
        "transformer-attribution": max(
            tokens * (7 * s.d + 4 * s.mlp), tokens * 7 * s.d + min(tiles * pairs, most)
        ),
        "lrp": max(clamped, tokens * 8 * s.d + 7 * tile + 4 * before),
        "partial-lrp": clamped,
        "attention-gradcam": tokens * (s.d + s.mlp) / 2 + (2 + 2.5 / s.heads) * tile,
    }[method]
    saved *= element
    if element < wide:
        # the layers' states in the dtype of the arithmetic, and the weights and activations of one Linear at
        # a time
        saved += (s.d + 2 * s.queries + 2 * s.keys) * wide
        workspace += rules * (s.d * s.mlp + tokens * (s.d + s.mlp))
    return Estimate(
        weights=weights,
        kernels=gradient * s.d * s.mlp * wide,
        saved=int(s.layers * tokens * saved),
        workspace=int(workspace * wide),
        maps=0,
    )


@dataclass(frozen=True)
class _Sizes:
    """Numbers a token: d, the MLP's inner width, all heads' queries, all heads' keys; and counts."""

    d: int
    mlp: int
    queries: int
    keys: int
    heads: int
    layers: int

    @classmethod
    def of(cls, config: Any) -> "_Sizes":
        d, heads = config.hidden_size, config.num_attention_heads
        mlp = next(
            (
                value
                for name in ("intermediate_size", "hidden_dim", "n_inner")
                if (value := getattr(config, name, None))
            ),
            4 * d,
        )
        dh = getattr(config, "head_dim", None) or d // heads
        keys = getattr(config, "num_key_value_heads", None) or heads
        return cls(d, mlp, heads * dh, keys * dh, heads, config.num_hidden_layers)


def _rollout_numbers(s: _Sizes, method: str) -> int:
    """Numbers a token at the rollout's worst moment."""
    if method not in OF_STAGE and method != "n-fixedres":
        return s.heads**2 + 4 * s.queries
    # the model's output, the mapped residual, G of the heads, and tiles as large as the values
    return s.d + s.heads**2 + 4 * s.queries


def _kernel_numbers(s: _Sizes, method: str, device: torch.device) -> int:
    """W_O M of `norm_terms` for one layer, or K and P of `gram_weights` on a GPU."""
    if method not in OF_STAGE and method != "n-fixedres":
        return 0
    return s.queries * s.d + (s.queries**2 if device.type == "cuda" else 0)
