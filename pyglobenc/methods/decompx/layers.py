"""A layer of a post-norm encoder as a linear map, with the values of one forward pass held fixed.

DecompX fixes the attention probabilities, the standard deviations of the layer norms, and for each unit of
the MLP the slope f(z) / z of the line from the origin to the activation. Then every part of a layer is
linear, up to its biases:

    u = sum over heads of alpha (t W_V) W_O + t,    y = norm1(u),    t' = norm2(y + mlp(y))
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from pyglobenc.backends.shared.relevance_tiles import probability_tiles
from pyglobenc.backends.shared.score_mods import to_dtype
from pyglobenc.common.deferred import require
from pyglobenc.hf import LayerModules, LayerTrace
from pyglobenc.hf.trace.threads import in_this_thread
from pyglobenc.hf.weights import dense_bias, dense_weight
from pyglobenc.methods.head import rounding

WHO = "DecompX"


class Affine(NamedTuple):
    """The map x @ weight + bias."""

    weight: Tensor  # (inputs, outputs)
    bias: Tensor  # (outputs,)

    @classmethod
    def of(cls, module: nn.Module, inputs: int, dtype: torch.dtype) -> "Affine":
        """Return the map of a Linear module; a missing bias is 0."""
        weight, bias = dense_weight(module, inputs).to(dtype), dense_bias(module, inputs)
        return cls(weight, weight.new_zeros(weight.shape[1]) if bias is None else bias.to(weight))


class Norm(NamedTuple):
    """A layer norm with its standard deviation held fixed."""

    rstd: Tensor  # (B, n, 1)
    gamma: Tensor  # (d,)
    beta: Tensor  # (d,)

    @classmethod
    def of(cls, trace: LayerTrace, part: str, dtype: torch.dtype) -> "Norm":
        """Return the norm of a captured layer, given its field name in `LayerModules`."""
        gamma, bias = trace.norm_weight(part).to(dtype), trace.norm_parts(part).bias
        rstd = trace.norms[part].rstd[..., None].to(dtype)
        return cls(rstd, gamma, torch.zeros_like(gamma) if bias is None else bias.detach().to(gamma))

    def map(self, t: Tensor) -> Tensor:
        """Return the norm of t (..., n, d) without the bias."""
        return (t - t.mean(-1, keepdim=True)).mul_(self.rstd).mul_(self.gamma)

    def back(self, g: Tensor) -> Tensor:
        """Return the transpose of `map` applied to g (..., n, d)."""
        g = g * self.gamma * self.rstd
        return g.sub_(g.mean(-1, keepdim=True))


class LinearLayer:
    """One layer of a forward pass as a linear map.

    Args:
        trace: the captured layer.
        slopes: f(z) / z of each unit of the MLP, (B, n, units).
        dtype: dtype of the arithmetic.
        example: None for the whole batch, or the number of one example and the positions of its real tokens
            (m,). Then B is 1 and n is m in all tensors.

    Attributes:
        x: input of the layer, (B, n, d).
        v: values, with their bias, (B, H, n, dh).
    """

    def __init__(
        self, trace: LayerTrace, slopes: Tensor, dtype: torch.dtype, example: tuple[int, Tensor] | None = None
    ):
        m, d = trace.modules, trace.x.shape[2]
        self.trace, self.dtype, self.example = trace, dtype, example
        self.x, self.v, self.slopes = (t.detach().to(dtype) for t in (trace.x, trace.v, slopes))
        self.value, self.intermediate = Affine.of(m.value, d, dtype), Affine.of(m.intermediate, d, dtype)
        self.output = Affine.of(m.output, self.v.shape[1] * self.v.shape[3], dtype)
        self.mlp_output = Affine.of(m.mlp_output, self.slopes.shape[2], dtype)
        self.norms = [Norm.of(trace, part, dtype) for part in ("attention_norm", "output_norm")]
        if example is not None:
            number, tokens = example[0], example[1].to(self.x.device)
            self.x, self.v = self.x[number, tokens][None], self.v[number][None, :, tokens]
            self.only(tokens, number)

    def only(self, rows: Tensor, number: int = 0) -> None:
        """Keep the norms' statistics and the slopes of some rows (R,) of one example alone."""
        self.slopes = self.slopes[number, rows][None]
        self.norms = [norm._replace(rstd=norm.rstd[number, rows][None]) for norm in self.norms]

    def probability_tiles(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield blocks of queries, the keys that they see, and their probabilities (B, H, I, J)."""
        trace, part = self.trace, slice(None)
        if self.example is not None:
            part = slice(self.example[0], self.example[0] + 1)
        mask = None if trace.key_mask is None else trace.key_mask[part]
        q, k, lse = (t[part].detach().to(self.dtype) for t in (trace.q, trace.k, trace.lse))
        mod = None if trace.score_mod is None else to_dtype(trace.score_mod, self.dtype)
        tiles = probability_tiles(q, k, lse, mask, trace.scaling, trace.window, score_mod=mod)
        return ((rows, cols, alpha) for rows, cols, _, alpha in tiles)

    def probabilities(self) -> Tensor:
        """Return the attention probabilities of one example's real tokens, (H, n, n)."""
        n, tokens = self.trace.x.shape[1], self.example[1].to(self.x.device)
        out = self.x.new_zeros(self.v.shape[1], n, n)
        for rows, cols, alpha in self.probability_tiles():
            out[:, rows, cols] = alpha[0]
        return out if len(tokens) == n else out[:, tokens[:, None], tokens]

    def values_back(self, g: Tensor) -> Tensor:
        """Return the sum over the queries i of alpha[i, j] g[i], (B, H, n, dh), for g of that shape."""
        out = torch.zeros_like(g)
        for rows, cols, alpha in self.probability_tiles():
            out[:, :, cols] += alpha.transpose(2, 3) @ g[:, :, rows]
        return out

    def mlp(self, t: Tensor) -> Tensor:
        """Return the MLP of t (..., n, d) without its biases."""
        return (t @ self.intermediate.weight).mul_(self.slopes) @ self.mlp_output.weight

    def units_back(self, g: Tensor) -> Tensor:
        """Return the gradient of the MLP's units before the activation, for g (..., n, d) at its output."""
        return (g @ self.mlp_output.weight.T).mul_(self.slopes)

    def after_norm(self, t: Tensor) -> Tensor:
        """Return the layer's output for t (..., n, d) in the place of y, without the biases."""
        return self.norms[1].map(self.mlp(t).add_(t))


@contextmanager
def recorded_slopes(
    found: Sequence[LayerModules], activation: str, dtype: torch.dtype
) -> Iterator[list[list[Tensor]]]:
    """Context that records f(z) / z of the MLP of every layer, and 0 where z is 0.

    An MLP may process the tokens in pieces. Layers may share modules.

    Args:
        found: the modules of each layer.
        activation: transformers' name of the activation f.
        dtype: dtype of the results.

    Yields:
        A list with one list for each layer, which holds its pieces (B, n, units).

    Raises:
        ValueError: an MLP applies another function than f between its Linear modules, or f(0) isn't 0.
    """
    f, slopes, units = ACT2FN[activation], [], []
    if f(torch.zeros(1)).item() != 0:
        raise ValueError(
            f"{WHO}: the activation {activation!r} isn't 0 at 0, so no line through the origin replaces it"
        )

    def start(module: nn.Module, args: tuple) -> None:
        slopes.append([])

    def keep(module: nn.Module, args: tuple, z: Tensor) -> None:
        units.append(z)

    def divide(module: nn.Module, args: tuple) -> None:
        z, a = units.pop().detach(), args[0].detach()
        near = ((f(z) - a).abs_() <= rounding(a) * (a.abs() + z.abs())).all()
        require(near, lambda: ValueError(_other_activation(activation)))
        z = z.to(dtype)
        slopes[-1].append((a.to(dtype) / z).masked_fill_(z == 0, 0))

    handles = [block.register_forward_pre_hook(in_this_thread(start)) for block in {m.block for m in found}]
    handles += [m.register_forward_hook(in_this_thread(keep)) for m in {m.intermediate for m in found}]
    handles += [m.register_forward_pre_hook(in_this_thread(divide)) for m in {m.mlp_output for m in found}]
    try:
        yield slopes
    finally:
        for handle in handles:
            handle.remove()


def _other_activation(name: str) -> str:
    return (
        f"{WHO}: an MLP computes something else than the config's activation {name!r} between its two Linear "
        "modules"
    )


def check_layers(found: Sequence[LayerModules], captured: Sequence[LayerTrace] = ()) -> None:
    """Check that the layers are built as those of BERT, whose parts the method decomposes.

    Args:
        found: the modules of each layer.
        captured: the captured layers, if there was a forward pass.

    Raises:
        ValueError: a layer is built otherwise. The message gives the reason.
    """
    for m in found:
        if m.pre_norm:
            _refuse("its layers normalise before the attention and the MLP")
        if m.value is None:
            _refuse("its layers have no Linear module of their own for the values")
        if m.intermediate is None:
            _refuse("its MLP is gated")
        if m.scale is not None or m.added_norm is not None:
            _refuse("its layers scale or normalise the attention's output before the residual sum")
    if any(layer.window != (-1, -1) for layer in captured):
        _refuse("its attention is causal or local")
    if any(layer.v.shape[1] != layer.q.shape[1] for layer in captured):
        _refuse("its heads share keys and values")


def _refuse(reason: str) -> None:
    raise ValueError(f"{WHO}: the decomposition is defined for BERT's layer, not for this model: {reason}")
