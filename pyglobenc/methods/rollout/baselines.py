"""Baselines that GlobEnc is compared with, on the same captured layers and the same kernels.

The mean of attention over heads is a norm whose Gram matrix is 1/H^2 everywhere. So every method but
attention flow runs in row mode.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyglobenc.backends.shared.rows import own_attention, rescale_rows
from pyglobenc.common.arguments import known_arguments
from pyglobenc.common.autocast import outside_autocast
from pyglobenc.hf import LayerTrace
from pyglobenc.methods.arguments import check_maps, model_inputs, packed_inputs
from pyglobenc.methods.inputs import check_model, require_finite, run_captured
from pyglobenc.methods.packing import attribute_packed
from pyglobenc.methods.rollout.alti import AltiMatrix
from pyglobenc.methods.rollout.flow import attention_flow
from pyglobenc.methods.rollout.layer_matrix import LayerMatrix, ResidualMatrix
from pyglobenc.methods.rollout.rows import (
    RolloutResult,
    roll_out,
    roll_out_rows,
    rollout_result,
    stack_layers,
)
from pyglobenc.methods.rollout.stages import STAGES, StageOps, check_stage, deepest_stage
from pyglobenc.methods.target_tokens import target_rows

ROLLOUTS = (
    "raw-attention",
    "w",
    "attention-rollout",
    "w-res",
    "n-fixedres",
    "n",
    "n-res",
    "n-resln",
    "globenc",
    "attention-flow",
    "alti",
)
OF_STAGE = {name.lower().replace("_", "-"): name for name in STAGES} | {"globenc": "N_Enc"}
MAPS = ("layers", "rollout")


class Rollout:
    """A method of the rollout family on a stock transformers model.

    Args:
        model: a model of a known architecture, or a module with its own head around one, in evaluation
            mode. It is left unchanged.
        method: a name in ROLLOUTS. `pyglobenc.methods.registry` gives the source of each method.
        backend: "auto", "reference", "cpu", "triton" or "cuda".
        dtype: dtype of the attribution arithmetic. None means float32, or float64 for a float64 model.

    Raises:
        TypeError, ValueError: The method, architecture or backend is unknown, or the model is in training
            mode.
    """

    @known_arguments
    def __init__(
        self,
        model: nn.Module,
        method: str = "attention-rollout",
        backend: str = "auto",
        dtype: torch.dtype | None = None,
    ):
        if method not in ROLLOUTS:
            raise ValueError(f"Rollout: method must be one of {', '.join(ROLLOUTS)}, got {method!r}")
        self.model = check_model("Rollout", model, backend, dtype)
        self.method, self.dtype = method, dtype
        self.ops = StageOps(backend)

    @known_arguments
    @outside_autocast
    @torch.no_grad()
    def __call__(
        self,
        *,
        targets: Sequence[int] | Tensor | str | None = None,
        layers: bool = False,
        maps: Sequence[str] = (),
        **batch: Any,
    ) -> RolloutResult:
        """Attribute target tokens of a batch to the input tokens.

        Args:
            targets: T token positions for every example, or (B, T). Position 0 is [CLS]. "mean" explains the
                mean of the rows of all real tokens, T = 1. None is the default target of `GlobEnc`.
            layers: whether to also return the result up to every layer. For raw attention this is the
                attention of every layer alone.
            maps: "layers" for every layer's matrix (B, L, n, n), and "rollout" for their product (B, n, n) in
                float64.
            batch: the inputs of the model, as `GlobEnc` takes them.

        Returns:
            RolloutResult with scores (B, T, n). Rows of attention flow sum to 1 before they are scaled.

        Raises:
            TypeError, ValueError: as `GlobEnc`.
        """
        batch = model_inputs("Rollout", self.model, batch, Rollout.__call__)
        check_maps("Rollout", maps, MAPS)
        captured, output, read = run_captured("Rollout", self.model, batch, self.dtype, targets)
        rows = target_rows("Rollout", targets, captured[-1], read)
        result = rollout_result("Rollout", self.model, *self._rows(captured, rows, layers), layers, captured)
        result.output, result.targets = output, None if rows.is_floating_point() else rows
        full = [self._matrix(layer).full() for layer in captured] if maps else []
        for name in maps:
            result.maps[name] = stack_layers(full) if name == "layers" else roll_out(full)
        if maps:
            # Maps also hold rows of other tokens. These may hold NaN even if the rows of the targets don't.
            require_finite("Rollout", self.model, result.maps.values())
        return result

    @known_arguments
    @outside_autocast
    @torch.no_grad()
    def packed(
        self, *, targets: Sequence[int] | Tensor | str | None = None, layers: bool = False, **batch: Any
    ) -> list[RolloutResult]:
        """Attribute target tokens of sequences of any lengths, packed end to end; attention flow can't.

        Args:
            targets, layers, batch: as `GlobEnc.packed` takes them.

        Returns:
            S results of batch size 1, in the order of the sequences. Each one equals the result of its
            sequence alone.

        Raises:
            TypeError, ValueError: as `GlobEnc.packed`, or the method is attention flow.
        """
        batch = packed_inputs("Rollout", batch, Rollout.packed)
        if self.method == "attention-flow":
            raise ValueError(
                "Rollout: attention-flow reads whole matrices of attention, which packed sequences don't have"
            )

        def rows(captured: list[LayerTrace], positions: Tensor) -> tuple[Tensor, Tensor]:
            return self._rows(captured, positions, layers)

        return attribute_packed("Rollout", self.model, batch, targets, self.dtype, layers, rows)

    def _rows(self, captured: list[LayerTrace], rows: Tensor, layers: bool) -> tuple[Tensor, Tensor]:
        cu_seqlens = captured[-1].cu_seqlens
        if self.method in OF_STAGE and self.method != "globenc":
            check_stage("Rollout", captured[-1], OF_STAGE[self.method])
        if self.method == "attention-flow" and rows.is_floating_point():
            raise ValueError(
                "Rollout: attention-flow starts from tokens, not from a mean of them; name the tokens: "
                "targets=[0]"
            )
        if self.method == "raw-attention":
            own = [
                roll_out_rows([self._matrix(layer)], rows, cu_seqlens=cu_seqlens)
                for layer in (captured if layers else captured[-1:])
            ]
            return stack_layers([scores[:, 0] for scores, _ in own]), stack_layers(
                [log_scale[:, 0] for _, log_scale in own]
            )
        if self.method != "attention-flow":
            return roll_out_rows(
                (self._matrix(layer) for layer in reversed(captured)), rows, layers, cu_seqlens
            )
        full = stack_layers([self._matrix(layer).full() for layer in captured])
        # The check comes first because the solver works on integers, which would hide NaN.
        require_finite("Rollout", self.model, (full,))
        scores = attention_flow(full, rows, captured[-1].key_mask, layers)
        return rescale_rows(scores, torch.zeros_like(scores[..., 0]))

    def _matrix(self, layer: LayerTrace) -> LayerMatrix:
        if self.method == "alti":
            return AltiMatrix(layer, self.ops)
        if self.method in OF_STAGE:
            return self.ops.norm_matrix(
                layer, deepest_stage(layer) if self.method == "globenc" else OF_STAGE[self.method]
            )
        if self.method == "n-fixedres":
            norms = self.ops.norm_matrix(layer, "N")
            sums = norms.row_sums()
            weight = torch.where(sums > 0, 0.5 / sums, sums)
            return ResidualMatrix(norms, weight, None, self._half(layer, weight))
        attention = self.ops.attention_matrix(layer)
        if self.method in ("raw-attention", "w"):
            return attention
        if self.method == "w-res":
            return self._measured(layer, attention)
        half = self._half(layer, attention.inputs.gram[:, :, 0, 0])
        return ResidualMatrix(attention, half, None, half)

    @staticmethod
    def _half(layer: LayerTrace, like: Tensor) -> Tensor:
        half = torch.full_like(like, 0.5)
        return half if layer.key_mask is None else half * layer.key_mask

    def _measured(self, layer: LayerTrace, attention: LayerMatrix) -> ResidualMatrix:
        ratio = self.ops.mixing_ratio(layer, deepest_stage(layer))
        q, k, lse = (
            t.to(ratio.dtype) for t in (attention.inputs.q, attention.inputs.k, attention.inputs.lse)
        )
        own = own_attention(q, k, lse, layer.scaling, attention.inputs.score_mod).mean(1)
        others = 1 - own
        weight = torch.where(others > 0, ratio / others, torch.zeros_like(ratio))
        kept = 1 - ratio
        return ResidualMatrix(
            attention, weight, own, kept if layer.key_mask is None else kept * layer.key_mask
        )
