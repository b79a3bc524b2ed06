"""AttCAT: attentive class activation tokens (Qiang et al., NeurIPS 2022), for every known architecture.

    score_j = sum_l w_l[j] <dy/dx_l[j], x_l[j]>,    w_l[j] = mean_i mean_h alpha_l[h,i,j]

x_l are the inputs of layer l, which the published code takes, and alpha_l its attention probabilities: w_l[j]
is the attention that token j receives, on average over the heads and the tokens that attend. The paper
applies the method to encoders of texts. For a causal model the mean is over the tokens up to the one whose
logit is explained. So a later token changes nothing.

The method takes one forward and one backward pass, and one pass over the pairs. w_l is the row 1/n times the
matrix of attention, so that no (n, n) array is stored.
"""

from typing import Any

import torch
from torch import Tensor, nn

from pyglobenc.common.arguments import known_arguments
from pyglobenc.common.autocast import outside_autocast
from pyglobenc.hf import LayerTrace
from pyglobenc.hf.limits import weights_named
from pyglobenc.methods.arguments import model_inputs
from pyglobenc.methods.differentiable import input_gradients, record_forward, recorded_target
from pyglobenc.methods.gradients.attribution import GradientResult, wide
from pyglobenc.methods.head import detached
from pyglobenc.methods.inputs import check_batch, check_model, require_finite
from pyglobenc.methods.rollout.stages import StageOps
from pyglobenc.methods.target import Index

WHO = "AttCat"


class AttCat:
    """AttCAT of a model with a head (Qiang et al., 2022).

    Args:
        model: a known architecture with a head, or a user's module with a head of its own around one, in
            evaluation mode. It is not changed.
        backend: "auto", "reference", "cpu", "triton" or "cuda", for the pass over the pairs.
        dtype: torch.float64 runs a narrower model in float64; None runs it as it is.

    Raises:
        TypeError, ValueError: an unknown architecture or backend, or a model in training mode.
    """

    @known_arguments
    def __init__(self, model: nn.Module, backend: str = "auto", dtype: torch.dtype | None = None):
        self.model = check_model(WHO, model, backend, dtype)
        self.ops, self.dtype = StageOps(backend), dtype

    @known_arguments
    @outside_autocast
    def __call__(
        self, *, target: Any = None, contrast: Index = None, position: Index = None, **batch: Any
    ) -> GradientResult:
        """Attribute one logit of each example to its tokens.

        Args:
            target, contrast, position: the logit explained, as `GradientRollout` takes them. A position
                (B, T) explains T logits of each example from one forward pass.
            batch: the model's inputs, such as input_ids and attention_mask (B, n), or pixel_values (B,
                channels, height, width).

        Returns:
            GradientResult with scores (B, n), or (B, T, n) for T logits; signed. For images n counts the
            special tokens too.

        Raises:
            TypeError, ValueError: an index is out of range, the model can't take the input, or a score isn't
                finite.
        """
        batch = model_inputs(WHO, self.model, batch, AttCat.__call__)
        check_batch(WHO, self.model, batch)
        with weights_named(self.model), torch.inference_mode(False), torch.enable_grad():
            run = record_forward(WHO, self.model, batch, wide=self.dtype == torch.float64)
            layers = run.trace.layers
            chosen = recorded_target(WHO, run, batch, (target, contrast, position))
            received = self._received(layers, chosen.position)
            logits = list(chosen.logit.unbind(1)) if chosen.logit.dim() == 2 else [chosen.logit]
            rows = []
            while logits:
                # The gradients of all layers exist for one logit at a time, on one graph.
                grads = input_gradients(logits.pop(0), run, keep=bool(logits))
                weights = [w[:, len(rows) if w.shape[1] > 1 else 0] for w in received]
                rows.append(_scores(layers, grads, weights))
        scores = torch.stack(rows, 1) if chosen.logit.dim() == 2 else rows[0]
        logit = chosen.logit.detach()
        require_finite(WHO, self.model, (scores, logit))
        return GradientResult(scores, chosen.index, logit, output=detached(run.output))

    @torch.no_grad()
    def _received(self, layers: list[LayerTrace], position: Tensor | None) -> list[Tensor]:
        """Return the mean attention that each token receives in each layer, (B, T, n), 0 at padding.

        position (B,) or (B, T) names the tokens whose logits are explained; None stands for the whole text.
        """
        last = layers[-1]
        device, (batch, _, n, _) = last.q.device, last.q.shape
        attends = torch.ones(batch, 1, n, dtype=torch.bool, device=device)
        if position is not None and last.window[1] == 0:
            attends = torch.arange(n, device=device) <= position.view(batch, -1, 1).to(device)
        if last.key_mask is not None:
            attends = attends & last.key_mask[:, None]
        mean = attends / attends.sum(2, keepdim=True, dtype=torch.float64)
        received = []
        for layer in layers:
            r = mean.to(layer.q.device, self.ops.dtype_of(layer))
            row, log_scale = self.ops.attention_matrix(layer).step(r, torch.zeros_like(r[..., 0]))
            received.append(row * log_scale.exp()[..., None])
        return received


@torch.no_grad()
def _scores(layers: list[LayerTrace], grads: list[Tensor], received: list[Tensor]) -> Tensor:
    """Return the scores (B, n), given the gradients (B, n, d) and the attention received (B, n) by layer."""
    scores = 0
    for layer, grad, weight in zip(layers, grads, received, strict=True):
        activation = (wide(layer.x.detach()) * wide(grad)).sum(-1)
        # A padded token may have any value, also infinity.
        scores = scores + (activation * weight).masked_fill(weight == 0, 0).to(layers[-1].q.device)
    return scores
