"""Runs the forward pass, and keeps what the decomposition holds fixed."""

from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyglobenc.common.autocast import callers_autocast
from pyglobenc.hf import LayerTrace, capture, find_layers
from pyglobenc.hf.limits import weights_named
from pyglobenc.hf.unwrap import stock_model
from pyglobenc.methods.arguments import run_model
from pyglobenc.methods.decompx.head import LinearHead
from pyglobenc.methods.decompx.layers import WHO, LinearLayer, check_layers, recorded_slopes
from pyglobenc.methods.head import detached, recorded_head
from pyglobenc.methods.inputs import graph_inputs
from pyglobenc.methods.precision.arithmetic import set_precision
from pyglobenc.methods.precision.float64_forward import WideParameters
from pyglobenc.methods.relevance.head_chain import Head, LinearStep, SumStep, follow_head
from pyglobenc.methods.target import Target, find_target


@dataclass
class States:
    """Tensors of one forward pass; n includes padding.

    Attributes:
        traces: the captured layers, first to last.
        slopes: f(z) / z of each layer's MLP, (B, n, units).
        head: the map from the last layer's output to the logit.
        top: output of the last layer in the dtype of the arithmetic, (B, n, d).
        target: the logit explained.
        output: the output of the model.
        dtype: dtype of the arithmetic.
        eps: relative rounding of the forward pass's coarsest tensors.
    """

    traces: list[LayerTrace]
    slopes: list[Tensor]
    head: LinearHead
    top: Tensor
    target: Target
    output: Any
    dtype: torch.dtype
    eps: float

    def layer(self, index: int, example: tuple[int, Tensor] | None = None) -> LinearLayer:
        """Return a layer as a linear map, for the batch or for the real tokens of one example."""
        return LinearLayer(self.traces[index], self.slopes[index], self.dtype, example)

    @property
    def real(self) -> Tensor:
        """Return the real tokens, (B, n) bool."""
        mask = self.traces[0].key_mask
        return torch.ones_like(self.top[..., 0], dtype=torch.bool) if mask is None else mask


def run_forward(
    model: nn.Module, batch: Mapping[str, Any], explained: tuple[Any, Any, Any], dtype: torch.dtype | None
) -> States:
    """Run the model on a batch. No autograd graph is made but that of the head.

    Args:
        model: a known architecture, or the user's module around one, in evaluation mode.
        batch: the model's checked inputs, such as input_ids (B, n).
        explained: target, contrast and position of the call.
        dtype: float32, float64 or None. With float64, the forward pass of a narrower model runs in float64.

    Returns:
        The tensors of the forward pass.

    Raises:
        ValueError: the method does not cover the layers or the head.
    """
    stock, own = stock_model(model), stock_model(model).dtype
    found = find_layers(stock)
    check_layers(found)
    arithmetic = dtype or (torch.float64 if own == torch.float64 else torch.float32)
    config = stock.config
    activation = config.activation if config.model_type == "distilbert" else config.hidden_act
    with weights_named(model), torch.inference_mode(False), torch.no_grad(), ExitStack() as stack:
        trace = stack.enter_context(capture(model))
        record = stack.enter_context(recorded_head(model, stock, trace, leaf=True))
        pieces = stack.enter_context(recorded_slopes(found, activation, arithmetic))
        wide = arithmetic == torch.float64 and own != torch.float64
        with WideParameters(torch.float64) if wide else nullcontext(), callers_autocast():
            output = run_model(model, graph_inputs(batch))
        traces = trace.layers
        check_layers(found, traces)
        # Under autocast the Linear modules compute in half precision and the norms don't.
        eps = max(torch.finfo(t.dtype).eps for one in traces for t in (one.x, one.q, one.o))
        set_precision(traces, dtype)
        mask = traces[0].key_mask
        target = find_target(WHO, output, *explained, mask)
        head = follow_head(model, record, target.logit, target.contrast is not None, mask, WHO)
        check_head(model, head)
        eps = max(eps, torch.finfo(target.logit.dtype).eps)
        # Large attention scores need float64.
        arithmetic = torch.promote_types(arithmetic, traces[0].q.dtype)
        top = record.top.detach().to(arithmetic)
    target.logit = target.logit.detach()
    slopes = [torch.cat(layer, 1) for layer in pieces]
    linear = LinearHead.of(head.to(arithmetic), top)
    return States(traces, slopes, linear, top, target, detached(output), arithmetic, eps)


def check_head(model: nn.Module, head: Head) -> None:
    """Check that the head is a chain of Linear modules and activations at the token, or mean, that it reads.

    Raises:
        ValueError: it isn't. The message names the module.
    """
    names = {module: name for name, module in model.named_modules()}
    if head.norms:
        _refuse(f"{names[head.norms[0]]} is a layer norm, which the published head doesn't have")
    sums = [i for i, step in enumerate(head.steps) if isinstance(step, SumStep)]
    if sums and any(isinstance(step, LinearStep) for step in head.steps[sums[0] :]):
        _refuse(f"{names[head.steps[-1].module]} is applied to every token before they are summed")


def _refuse(reason: str) -> None:
    raise ValueError(f"{WHO}: the head isn't a chain of Linear modules and activations: {reason}")
