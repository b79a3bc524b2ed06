"""Runs the forward pass with gradients, checks the layers, and keeps the tensors that the rules read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyglobenc.backends.shared.packing import per_token, real_tokens
from pyglobenc.hf import LayerModules, LayerTrace, Trace, find_layers
from pyglobenc.hf.limits import weights_named
from pyglobenc.hf.trace.checks import LINEAR
from pyglobenc.hf.trace.layers import outside
from pyglobenc.hf.unwrap import stock_model
from pyglobenc.hf.weights import is_plain
from pyglobenc.methods.differentiable import attention_gradients, doubled, record_forward
from pyglobenc.methods.packing import Packed, of_examples
from pyglobenc.methods.relevance.head_chain import Head, follow_head
from pyglobenc.methods.target import Index, Target, find_target

WHO = "TransformerAttribution"


@dataclass
class States:
    """Tensors of one forward pass. The number of tokens n includes padding.

    If the examples run twice, B counts each of them twice. The second half of the batch then holds the
    perturbed run. S packed sequences are one example of all their tokens, but have S targets and outputs.

    Attributes:
        layers: the captured layers, first to last, detached.
        grads: gradient of the explained logit with respect to each layer's attention output, (B, H, n, dh);
            None below the lowest layer asked for.
        io: input and output of each Linear module of the layers, and of ViT's convolution, detached; see
            `input_output`.
        head: the steps from the logit down to the last layer's output.
        target: the logit explained.
        output: the output of the model, without the perturbed run.
        dtype: dtype of the relevance arithmetic.
        twice: True if the second half of the tensors is the perturbed run.
    """

    layers: list[LayerTrace]
    grads: list[Tensor | None]
    io: dict[nn.Module, tuple[Tensor, Tensor]]
    head: Head
    target: Target
    output: Any
    dtype: torch.dtype
    twice: bool

    def input_output(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        """Return the input and the output of a module, in the dtype of the arithmetic."""
        given, returned = self.io[module]
        return given.to(self.dtype), returned.to(self.dtype)

    @property
    def cu_seqlens(self) -> Tensor | None:
        """Return cu_seqlens of packed sequences without the perturbed run, (S + 1,) int32, on the CPU."""
        cu_seqlens = self.layers[0].cu_seqlens
        return cu_seqlens if cu_seqlens is None or not self.twice else cu_seqlens[: self.count + 1]

    @property
    def forward_dtype(self) -> torch.dtype:
        """Return the dtype of the forward pass. Under autocast it differs from that of the parameters."""
        return next(iter(self.io.values()))[1].dtype

    def lone_tokens(self) -> Tensor:
        """Return (B, n) bool, or (1, N) for packed sequences: True for the only token of an example."""
        layer = self.layers[0]
        if layer.cu_seqlens is not None:
            return per_token((layer.cu_seqlens.diff() == 1)[:, None].to(layer.x.device), layer.cu_seqlens)[
                :, 0
            ]
        mask = (
            torch.ones_like(layer.x[..., 0], dtype=torch.bool) if layer.key_mask is None else layer.key_mask
        )
        return mask & (mask.sum(1, keepdim=True) == 1)

    @property
    def count(self) -> int:
        """Return the number of examples, without the perturbed run."""
        return len(self.target.index) // (2 if self.twice else 1)

    def split_perturbed(self, t: Tensor) -> tuple[Tensor, Tensor | None]:
        """Split a tensor (B, n, ...) into the examples themselves and the perturbed run, or None."""
        return tuple(t.chunk(2, 0 if self.layers[0].cu_seqlens is None else 1)) if self.twice else (t, None)

    def pooled_index(self, device: torch.device) -> Tensor | None:
        """Return the index of the token that the head reads, (B, 1), or (1, S) for packed sequences.

        None if the head reads several tokens.
        """
        if self.head.position is None:
            return None
        position, cu_seqlens = self.head.position.to(device), self.layers[0].cu_seqlens
        return position[:, None] if cu_seqlens is None else (position + cu_seqlens[:-1].to(device))[None]

    def packed(self, t: Tensor) -> Tensor:
        """Return t (B, n, ...) unchanged, or for packed sequences turn (S, n, ...) into (1, N, ...)."""
        cu_seqlens = self.layers[0].cu_seqlens
        return t if cu_seqlens is None else t[real_tokens(cu_seqlens).to(t.device)][None]


def run_forward(
    model: nn.Module,
    batch: Mapping[str, Any] | Packed,
    target: tuple[Any, Index, Index],
    dtype: torch.dtype | None,
    lowest: int,
    twice: bool = False,
) -> States:
    """Run the model on a batch and take the gradient of the explained logit.

    The graph starts at the first layer's input, so the parameters get no gradient and keep their flags.

    Args:
        model: a known architecture, or the user's module around one, in evaluation mode.
        batch: the model's checked inputs, such as input_ids (B, n), or packed sequences.
        target: target, contrast and position of the call.
        dtype: float32, float64 or None. With float64, the forward pass of a narrower model runs in float64.
        lowest: lowest layer whose gradient is wanted; the number of layers for none.
        twice: run all examples a second time in the same batch, perturbed by a rounding unit in every layer.
            The perturbed run takes the target and the gradients of the first run.

    Returns:
        The tensors of the forward pass.

    Raises:
        ValueError: the relevance rules do not cover the layers or the head.
    """
    stock = stock_model(model)
    found = find_layers(stock)
    check_layers(found)
    own = next(stock.parameters()).dtype
    arithmetic = dtype or (torch.float64 if own == torch.float64 else torch.float32)
    with weights_named(model), torch.inference_mode(False), torch.enable_grad():
        packed = isinstance(batch, Packed)
        if twice:
            batch = batch.twice() if packed else doubled(stock, batch)
        run = record_forward(WHO, model, batch, _ruled(stock, found), arithmetic == torch.float64, twice)
        trace, record, output = run.trace, run.record, run.output
        check_layers(found, trace.layers)
        mask = real = real_tokens(batch.cu_seqlens) if packed else trace.layers[0].key_mask
        if twice:
            size = len(record.top)
            half = slice(0, size // 2)
            output, mask = of_examples(output, half, size), mask if mask is None else mask[half]
        chosen = find_target(WHO, output, *target, mask)
        head = follow_head(model, record, chosen.logit, chosen.contrast is not None, real)
        grads = attention_gradients(chosen.logit, run, lowest)
    chosen.logit = chosen.logit.detach()
    if twice:
        axis = 2 if packed else 0
        grads = [None if g is None else torch.cat([g.chunk(2, axis)[0]] * 2, axis) for g in grads]
        chosen = Target(*(None if t is None else t.repeat(2) for t in vars(chosen).values()))
    grads = [None if g is None else g.to(arithmetic) for g in grads]
    return States(
        trace.layers,
        grads,
        _detach(trace, arithmetic),
        head.to(arithmetic),
        chosen,
        output,
        arithmetic,
        twice,
    )


def _ruled(stock: nn.Module, found: Sequence[LayerModules]) -> list[nn.Module]:
    """Return the modules whose inputs and outputs the relevance rules read."""
    parts = ("query", "key", "value", "output", "intermediate", "mlp_output")
    within = [getattr(m, part) for m in found for part in parts]
    # A ViT has one convolution outside its layers, which embeds the patches.
    return within + [
        module for module in outside(stock, {layer.block for layer in found}) if isinstance(module, nn.Conv2d)
    ]


def _detach(trace: Trace, dtype: torch.dtype) -> dict[nn.Module, tuple[Tensor, Tensor]]:
    """Detach the tensors of a trace, and return those of the modules.

    The layers' tensors are replaced in the trace, in the dtype of the arithmetic.
    """
    for layer in trace.layers:
        layer.x, layer.q, layer.k, layer.v, layer.o, layer.lse = (
            t.detach().to(dtype) for t in (layer.x, layer.q, layer.k, layer.v, layer.o, layer.lse)
        )
    return {module: (given.detach(), returned.detach()) for module, (given, returned) in trace.io.items()}


def check_layers(found: Sequence[LayerModules], captured: Sequence[LayerTrace] = ()) -> None:
    """Check that the layers are built as those of BERT or ViT, which the relevance rules cover.

    Args:
        found: the modules of each layer.
        captured: the captured layers, if there was a forward pass.

    Raises:
        ValueError: a layer is built otherwise. The message gives the reason.
    """
    if len({id(m.block) for m in found}) < len(found):
        _refuse("its layers share modules, and each call of a module has its own relevance")
    for m in found:
        missing = [part for part in LINEAR if getattr(m, part) is None]
        if missing:
            _refuse(f"its layers have no Linear module of their own for {' and '.join(missing)}")
        for part in LINEAR:
            module = getattr(m, part)
            if type(module) is not nn.Linear or not is_plain(module.weight):
                _refuse(
                    f"{part} of a layer is a {type(module).__module__}.{type(module).__name__} whose "
                    f"weights aren't a plain matrix here; "
                    "merge adapters (merge_and_unload), load it unquantised, and don't offload its weights"
                )
        if m.pre_norm and not all(
            isinstance(norm, nn.LayerNorm) for norm in (m.attention_norm, m.output_norm)
        ):
            _refuse("a norm before its attention or MLP is not a torch.nn.LayerNorm")
        if m.scale is not None or m.added_norm is not None:
            _refuse("its layers scale or normalise the attention's output before the residual sum")
        if m.own_scores is not None:
            _refuse("it computes attention scores itself")
    if any(layer.score_mod is not None for layer in captured):
        _refuse("its attention scores have a bias or a soft cap")
    if any(layer.window != (-1, -1) for layer in captured):
        _refuse("its attention is causal or local")


def _refuse(reason: str) -> None:
    raise ValueError(f"TransformerAttribution: the relevance rules don't cover this model: {reason}")
