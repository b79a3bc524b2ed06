"""Estimates the memory of an attribution before it runs, from the model's config and the batch's shape.

The peak of the rollout family is at one of three moments: the last layer's MLP in the forward pass, the norm
after it, or the rollout of a layer. All that is saved for the rollout exists at each of them. The peak
of the methods that explain a class is in the pass down. There autograd's graph of every layer and the
relevance exist at the same time. Sizes are counted as numbers a token (d, the MLP's width, H...) times the
tokens of the batch, B*n.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from pyglobenc.backends.shared.launch import HALF
from pyglobenc.backends.shared.relevance_tiles import MIN_QUERIES, TILE_FLOATS
from pyglobenc.hf.limits import patch_size
from pyglobenc.hf.registry import find_layers, is_decoder
from pyglobenc.hf.trace.norms import is_stock
from pyglobenc.methods.decompx.absdot import TILE_VECTORS
from pyglobenc.methods.decompx.decompx import MEMORY
from pyglobenc.methods.gradients.attribution import COPIED_TOKENS, GRADIENTS, STEPS
from pyglobenc.methods.gradients.backward_rules import RULES
from pyglobenc.methods.precision.reliability import measured
from pyglobenc.methods.rollout.alti import block_size, keys_at_a_time
from pyglobenc.methods.rollout.baselines import OF_STAGE, ROLLOUTS

# Attention flow reads the whole map of every layer. For one example at a time, numpy and scipy hold this many
# bytes for each entry of its maps.
FLOW, EDGE, ALTI = "attention-flow", 64, "alti"
FLOAT32, FLOAT64 = 4, 8
RELEVANCE = (
    "transformer-attribution",
    "transformer-attribution-last",
    "lrp",
    "partial-lrp",
    "attention-gradcam",
)
GRADIENT_ROLLOUT, INFORMATION_FLOW, DECOMPX = "gradient-rollout", "information-flow", "decompx"
CAPTURED = (GRADIENT_ROLLOUT, "attcat")  # autograd's graph of a captured model
ESTIMATED = (*ROLLOUTS, INFORMATION_FLOW, *RELEVANCE, *CAPTURED, *GRADIENTS, *RULES, DECOMPX)
# How many tiles of (query, key) pairs the reference of the relevance ops holds in float64, and the most
# numbers in all of them together. The kernels hold none.
TILES, MOST = 8, 3 << 20


@dataclass(frozen=True)
class Estimate:
    """Bytes that an attribution takes, by what they hold. `peak` is their sum.

    Attributes:
        weights: the model's parameters and buffers, which exist before the call.
        kernels: tensors made from the weights of one layer at a time: W_O with the norms, or |W| of a Linear.
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
            "kernels": "derived from weights",
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
    """Estimate the peak memory of a call of a method.

    The arguments targets, layers and maps only matter for the rollout family. Explaining generated tokens
    takes the memory of one example, whose n tokens are the prompt and the answer.

    Args:
        model: a transformers model. It may be on torch's meta device, where its weights take no memory.
        batch: B, number of examples at a time.
        n: number of tokens of the longest example, with special tokens.
        method: a name in ESTIMATED.
        targets: T, number of targets an example.
        layers: whether the result holds the rollout up to every layer.
        maps: number of maps (B, L, n, n) that are asked for. head_N counts as the number of heads.
        dtype: dtype of the attribution arithmetic, as for `GlobEnc`.

    Returns:
        Estimate, in bytes.

    Raises:
        ValueError: no estimate is known for the method, or for the model: its architecture is unknown or an
            encoder-decoder, or it computes attention itself.
    """
    if method not in ESTIMATED:
        raise ValueError(f"estimate_memory: method must be one of {', '.join(ESTIMATED)}, got {method!r}")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"estimate_memory: no estimate is known for {type(model).__name__}, which has two streams of "
            "tokens"
        )
    if find_layers(model)[0].own_scores is not None:
        raise ValueError(
            f"estimate_memory: no estimate is known for {type(model).__name__}, which computes attention "
            "itself and stores scores of every pair of tokens"
        )
    s, element = _Sizes.of(model), torch.empty((), dtype=model.dtype).element_size()
    wide = FLOAT64 if FLOAT64 in (element, dtype and torch.empty((), dtype=dtype).element_size()) else FLOAT32
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    if method in RELEVANCE:
        return _relevance(
            s, method, weights, batch, n, element if dtype is None else wide, wide, model.device
        )
    if method in GRADIENTS or method in RULES:
        return _gradients(s, method, weights, batch, n, element if dtype is None else wide)
    if method in CAPTURED:
        return _captured_graph(s, method, weights, batch, n, element, wide)
    if method == DECOMPX:
        return _decompx(s, weights, batch, n, element if dtype is None else wide, wide)
    tokens = batch * n
    # If float64 is asked for, the states of a float32 model are cast before the rollout.
    state = wide if dtype == torch.float64 else element
    forward = s.forward * element
    # The output of a language model, its logits, exists during the rollout.
    rollout = (_rollout_numbers(s, method) + (s.d if element < wide else 0)) * wide + s.logits * element
    rows = 3 * batch * targets * n * (s.layers if layers else 1) * wide
    workspace, entries = max(tokens * forward, tokens * rollout + rows), s.layers * n * n
    # The maps of all layers exist together with the array that they are stacked into.
    stored = 2 * maps * batch * entries * wide
    if method == ALTI:
        # The numbers a token were counted.
        pairs = batch * _alti_pairs(s, batch, n, model)
        workspace = max(
            tokens * forward, (tokens * 7 * s.d + pairs) * wide + rows + tokens * s.logits * element
        )
    if method == FLOW:
        stored += batch * entries * wide
        workspace = max(workspace + batch * entries * wide, EDGE * entries)
    return Estimate(
        weights=weights,
        kernels=_kernel_numbers(s, method, model.device) * wide,
        saved=s.layers * tokens * (s.states * state + (s.heads + 4) * wide),
        workspace=workspace,
        maps=stored,
    )


def _alti_pairs(s: "_Sizes", batch: int, n: int, model: PreTrainedModel) -> int:
    """Return how many numbers of pairs an example holds: a tile of probabilities, and two blocks of rows."""
    size, most, before = block_size(s.d, s.heads), 0, 0
    for start in range(0, n, size):
        rows = min(size, n - start)
        seen = start + rows if is_decoder(model) else n
        tile = min(seen, keys_at_a_time(batch * s.heads * rows, model.device))
        most, before = max(most, rows * s.heads * tile + rows * seen + before), rows * seen
    return most


def _relevance(
    s: "_Sizes", method: str, weights: int, batch: int, n: int, element: int, wide: int, device: torch.device
) -> Estimate:
    """Estimate a method that explains a class.

    The counts of the numbers that autograd and the rules keep were found with the allocator's statistics.
    """
    matrices = s.layers * 2 * (s.d * s.queries + s.d * s.keys + s.d * s.mlp)
    rules, gradient = method != "attention-gradcam", method == "transformer-attribution"
    # The error of a small model is measured by a second run in the same batch.
    if rules and wide == FLOAT32 and measured(matrices * batch * n, device):
        batch *= 2
    tokens = batch * n
    pairs = batch * s.heads * n * n
    # The sizes of the current tile and of the one before it.
    tile = min(pairs, max(TILE_FLOATS, MIN_QUERIES * batch * s.heads * n))
    before = min(tile, pairs - tile)
    states = 4 * s.d + s.queries + s.keys + 2 * s.mlp
    # Autograd keeps more tensors. Fewer are left where the backward pass through all layers has freed some.
    saved = states + (3 * s.d if gradient else 4 * s.d)
    # The size of the clamped copies of an MLP's weights and activations.
    clamped = tokens * (2 * s.d + 4.5 * s.mlp) + 2 * s.d * s.mlp
    workspace = {
        "transformer-attribution": max(
            tokens * (7 * s.d + 4 * s.mlp),
            tokens * 7 * s.d + (min(TILES * pairs, MOST) if wide == FLOAT64 else 0),
        ),
        "transformer-attribution-last": max(
            tokens * (5 * s.d + 4.5 * s.mlp),
            5 * pairs if wide == FLOAT64 else 0,
        ),
        "lrp": max(clamped, tokens * 8 * s.d + 7 * tile + 4 * before),
        "partial-lrp": clamped,
        # Of an image only the row of [CLS] is read.
        "attention-gradcam": tokens * (s.d + s.mlp) / 2 + (0 if s.pixels else (2 + 2.5 / s.heads) * tile),
    }[method]
    saved *= element
    if element < wide:
        # The layers' states are cast to the dtype of the arithmetic. So are the weights and activations of
        # one Linear at a time.
        saved += (s.d + 2 * s.queries + 2 * s.keys) * wide
        workspace += rules * (s.d * s.mlp + tokens * (s.d + s.mlp))
    return Estimate(
        weights=weights,
        kernels=gradient * s.d * s.mlp * wide,
        saved=int(s.layers * tokens * saved),
        workspace=int(workspace * wide),
        maps=0,
    )


def _gradients(s: "_Sizes", method: str, weights: int, batch: int, n: int, element: int) -> Estimate:
    """Estimate a method of `GradientAttribution`: autograd's graph, or the forward pass of copies.

    The counts were found with the allocator's statistics.
    """
    tokens = batch * n
    graph, rest = s.layers * s.graph + s.head, s.backward
    if method in RULES:
        graph, rest = s.layers * s.ruled_graph(method, element) + s.logits, s.ruled_backward(method)
    elif method == "integrated-gradients":
        tokens *= min(STEPS[-1], max(1, COPIED_TOKENS // tokens))
        # The logits of the copies before these exist too.
        rest += 3 * s.d + s.pixels + s.logits
    elif method == "occlusion":
        tokens = n * min(batch * n, max(1, COPIED_TOKENS // n))
        graph, rest = 0, s.forward + 2 * s.d + 2 * s.pixels
    return Estimate(weights, 0, saved=tokens * graph * element, workspace=tokens * rest * element, maps=0)


def _captured_graph(
    s: "_Sizes", method: str, weights: int, batch: int, n: int, element: int, wide: int
) -> Estimate:
    """Estimate a method on autograd's graph of a captured model; counted like `_gradients`."""
    tokens, pairs = batch * n, batch * s.heads * n * n
    # Captured attention keeps a key and a value for each query head beside those of the model.
    graph = s.graph + (2 * s.queries if s.keys < s.queries else 0)
    tiles = min(2 * pairs, MOST) if wide == FLOAT64 else 0
    # The gradients of all layers' inputs exist together.
    rest = s.layers * s.d if method == "attcat" else 3 * s.d
    return Estimate(
        weights,
        0,
        saved=tokens * (s.layers * graph + s.head) * element,
        workspace=tokens * (s.backward + rest) * element + tiles * wide,
        maps=0,
    )


def _decompx(s: "_Sizes", weights: int, batch: int, n: int, element: int, wide: int) -> Estimate:
    """Estimate `DecompX` with bias="absdot", one example at a time after the forward pass."""
    step = max(1, TILE_VECTORS // n)
    tile = min(step, n) * n * s.d
    kept = min(-(-n // step), MEMORY // (step * n * s.d * wide)) * tile
    # Without room for all vectors, the shares of all layers are kept, and two layers' probabilities exist.
    again = kept < n * n * s.d
    pairs = n * n * (s.heads * (2 if again else 1) + 5 * (s.layers if again else 1))
    inner = tile // s.d * (s.mlp + 4 * s.d)
    return Estimate(
        weights,
        0,
        saved=s.layers * batch * n * ((2 * s.d + s.queries + 2 * s.keys) * element + s.mlp * wide),
        workspace=int(kept + pairs + inner) * wide,
        maps=0,
    )


@dataclass(frozen=True)
class _Sizes:
    """What a model computes for one token.

    Attributes:
        d, mlp, queries, keys: sizes of the hidden state, of the MLP's inner state, of the queries and of the
            keys of all heads.
        heads, layers: their numbers.
        norms: number of norms of a hidden state in a layer.
        head_norms: number of norms of the queries and keys in a layer.
        norm: how many numbers autograd keeps for each number of a norm's input: torch's own norms keep the
            input, and those made of single operations also the quotient. In half precision they keep a
            float32 copy of the input.
        gated: whether the MLP multiplies two inner states.
        joined: whether one tensor holds both of them.
        kept: how many numbers autograd keeps beside the input for each number of the MLP's activation.
        rotates: whether one module computes q, k and v, and positions turn copies of q and k.
        scaled: whether a layer scale multiplies what is added to the hidden state.
        logits: size of a language model's logits, and 0 for another model.
        pixels: numbers of one patch of an image, and 0 for text.
    """

    d: int
    mlp: int
    queries: int
    keys: int
    heads: int
    layers: int
    norms: int
    head_norms: int
    norm: int
    gated: bool
    joined: bool
    kept: int
    rotates: bool
    scaled: bool
    logits: int
    pixels: int

    @property
    def forward(self) -> int:
        """Return how many numbers the forward pass holds when it holds the most, beside what is saved.

        That is in the last attention or MLP, in the residual sum after it, or in the head.
        """
        live = 3 + self.joined if self.gated else 2 + min(self.kept, 2)
        attention = 2 * self.d + 4 * self.queries + 3 * self.keys if self.rotates else 0
        return max(live * self.mlp + 2 * self.d, self.mlp + 4 * self.d, self.logits + 2 * self.d, attention)

    @property
    def states(self) -> int:
        """Return how many numbers of one layer a capture keeps: x, q, k, v and o."""
        turned = self.queries + self.keys if self.rotates else 0
        return self.d + 2 * self.queries + 2 * self.keys + turned

    @property
    def graph(self) -> int:
        """Return how many numbers autograd keeps of one layer, for the gradient of its input."""
        streams = (self.norms * self.norm + 2 + 2 * self.scaled) * self.d + self.head_norms * (
            self.queries + self.keys
        )
        heads = (2 + self.rotates) * (self.queries + self.keys) + 2 * self.heads
        return streams + heads + ((4 if self.gated else 2) + self.kept) * self.mlp

    @property
    def head(self) -> int:
        """Return how many numbers autograd keeps of the last norm and the head."""
        return (self.norm + 1) * self.d + self.logits if self.logits else 0

    @property
    def backward(self) -> int:
        """Return how many numbers the backward pass holds beside the graph when it holds the most."""
        return max(4 * self.d, self.logits)

    def ruled_graph(self, method: str, element: int) -> int:
        """Return how many numbers autograd keeps of one layer under backward rules.

        A layer keeps no input for the gradients of its weights. Norms made of single operations keep theirs.
        Attention keeps q, k, v, o and lse, with a key and a value for each query head. Constant
        probabilities need neither v nor o, except in half precision, where a tempered softmax has a second
        output. An activation keeps the slope of its secant, or what its derivative needs, and a gated product
        its factors, of which one may be constant.
        """
        rules, turned = RULES[method], self.queries + self.keys
        constant = not rules.probabilities and element >= FLOAT32
        pairs = turned if constant else 4 * self.queries + self.rotates * turned
        second = self.queries + self.heads if rules.temperature != 1 and element < FLOAT32 else 0
        norms = 0 if self.norm == 1 else self.norm * self.norms * self.d + self.head_norms * turned
        inner = 1 if rules.secants else 1 + self.kept
        if self.gated:
            inner += 1 + (1 + self.joined) * rules.halves
        return pairs + second + norms + 2 * self.scaled * self.d + inner * self.mlp + self.heads

    def ruled_backward(self, method: str) -> int:
        """Return how many numbers a pass under backward rules holds beside its graph."""
        rules = RULES[method]
        # The activation of a secant is computed without a graph.
        live = (
            3 + self.joined
            if self.gated and rules.halves
            else 2 + (min(self.kept, 2) if rules.secants else 0)
        )
        return max(live * self.mlp + 3 * self.d, 7 * self.d, self.logits)

    @classmethod
    def of(cls, model: PreTrainedModel) -> "_Sizes":
        config, found = model.config, find_layers(model)
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
        layer = found[0]
        widths = [
            module.weight.numel()
            for module in layer.block.modules()
            if "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None
        ]
        gated, out = layer.intermediate is None, model.get_output_embeddings()
        return cls(
            d,
            mlp,
            heads * dh,
            keys * dh,
            heads,
            len(found),
            norms=widths.count(d),
            head_norms=int(len(widths) > widths.count(d)),
            norm=1 if is_stock(layer.output_norm) else 3 if model.dtype in HALF else 2,
            gated=gated,
            joined=any(getattr(one, "out_features", 0) == 2 * mlp for one in layer.block.modules()),
            kept=0 if gated else _kept_by_activation(config),
            rotates=layer.query is None and hasattr(config, "rope_parameters"),
            scaled=layer.scale is not None,
            logits=0 if out is None else len(out.weight),
            pixels=_pixels(model),
        )


def _kept_by_activation(config: Any) -> int:
    """Return how many numbers autograd keeps for each number of the MLP's activation, beside its input."""
    names = ("hidden_act", "activation_function", "hidden_activation", "activation")
    name = next((found for name in names if isinstance(found := getattr(config, name, None), str)), None)
    if name not in ACT2FN:
        return 0
    kept = {}
    x = torch.ones(1, device="cpu")
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t),
    ):
        ACT2FN[name](x.clone().requires_grad_())
    return max(0, len(kept) - 1)


def _pixels(model: PreTrainedModel) -> int:
    """Return how many numbers one patch of an image has, and 0 for a model of text."""
    if model.main_input_name != "pixel_values":
        return 0
    height, width = patch_size(model)
    return height * width * model.config.num_channels


def _rollout_numbers(s: _Sizes, method: str) -> int:
    """Return how many numbers a token the rollout holds when it holds the most."""
    if method == INFORMATION_FLOW:
        return s.d + 2 * s.queries
    if method not in OF_STAGE and method != "n-fixedres":
        return s.heads**2 + 4 * s.keys
    # These are the model's output, the mapped residual, G of the heads, and tiles as large as the values.
    return s.d + s.heads**2 + 4 * s.keys


def _kernel_numbers(s: _Sizes, method: str, device: torch.device) -> int:
    """Return the size of W_O M of `norm_terms` for one layer, or of K and P of `gram_weights` on a GPU."""
    if method not in OF_STAGE and method != "n-fixedres":
        return 0
    return s.queries * s.d + (s.queries**2 if device.type == "cuda" else 0)
