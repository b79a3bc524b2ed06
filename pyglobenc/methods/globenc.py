"""GlobEnc: norms of decomposed vectors through the whole encoder layer, rolled out (Modarressi et al., NAACL 2022)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pyglobenc.backends import check_backend
from pyglobenc.hf import LayerTrace, capture, find_layers
from pyglobenc.hf.limits import check_weights
from pyglobenc.methods.inputs import check_batch
from pyglobenc.methods.layer_matrix import LayerMatrix
from pyglobenc.methods.precision import set_precision
from pyglobenc.methods.rollout import roll_out, roll_out_rows
from pyglobenc.methods.stages import STAGES, StageOps
from pyglobenc.methods.targets import target_rows

MIXING = {f"mix_{name}": name for name in STAGES}
MAPS = ("head_N", *STAGES, *MIXING, "rollout")


@dataclass
class RolloutResult:
    """Rows of a rollout.

    Attributes:
        scores: (B, T, n), row `target` of the rollout, largest entry of each row 1; padding 0.
        log_scale: (B, T); the unnormalised value is scores * exp(log_scale).
        layer_scores: (B, L, T, n), the rollout up to each layer, scaled the same way; None unless asked for.
        layer_log_scale: (B, L, T), or None.
        maps: the maps asked for, by name.
        output: what the model returned.
    """

    scores: Tensor
    log_scale: Tensor
    layer_scores: Tensor | None = None
    layer_log_scale: Tensor | None = None
    maps: dict[str, Tensor] = field(default_factory=dict)
    output: Any = None


class GlobEnc:
    """GlobEnc attribution of a stock transformers encoder.

    Args:
        model: a known architecture, in evaluation mode; left as it is.
        backend: "auto", "reference", "cpu", "triton" or "cuda".
        dtype: of the attribution arithmetic; None is float32, or float64 for a float64 model.

    Raises:
        TypeError, ValueError: unknown architecture or backend, training mode, weights that are NaN or infinite.
    """

    def __init__(self, model: PreTrainedModel, backend: str = "auto", dtype: torch.dtype | None = None):
        check_backend(backend, "GlobEnc")
        if dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"GlobEnc: dtype must be None, torch.float32 or torch.float64, got {dtype}")
        find_layers(model)
        check_weights(model)
        self.model = model
        self.dtype = dtype
        self.ops = StageOps(backend)

    @torch.no_grad()
    def __call__(
        self, *, targets: Sequence[int] | Tensor = (0,), stage: str = "N_Enc", layers: bool = False, maps: Sequence[str] = (), **batch: Any
    ) -> RolloutResult:
        """Attribute target tokens of a batch to the input tokens.

        Row mode, the default, stores no (n, n) array: memory is O(L*n*d + T*n). Each name in maps costs its own size.

        Args:
            targets: token positions, T for every example or (B, T); 0 is [CLS].
            stage: "N", "N_Res", "N_ResLN" or "N_Enc", whose norms are rolled out.
            layers: also return the rollout up to every layer.
            maps: any of "head_N" (B, L, H, n, n); "N", "N_Res", "N_ResLN", "N_Enc" (B, L, n, n); "mix_" and a stage's name (B, L, n);
                "rollout" (B, n, n), unnormalised, float64. Rows of padding are 0.
            batch: the model's inputs, as its tokenizer returns them.

        Returns:
            RolloutResult.

        Raises:
            TypeError, ValueError: unknown stage or map, targets out of range or padding, input longer than the model takes,
                an example without a real token, a result that isn't finite.
        """
        if stage not in STAGES:
            raise ValueError(f"GlobEnc: stage must be one of {', '.join(STAGES)}, got {stage!r}")
        unknown = [name for name in maps if name not in MAPS]
        if isinstance(maps, str) or unknown:
            raise ValueError(f"GlobEnc: maps must be a sequence of names among {', '.join(MAPS)}, got {maps!r}")
        check_batch("GlobEnc", self.model, batch)
        with capture(self.model) as trace:
            output = self.model(**batch)
        set_precision(trace.layers, self.dtype)
        matrices = [self.ops.norm_matrix(layer, stage) for layer in trace.layers]
        result = explain_rows("GlobEnc", trace.layers, matrices, targets, layers)
        result.output = output
        for name in maps:
            result.maps[name] = self._map(name, trace.layers, matrices)
        return result

    def _map(self, name: str, layers: list[LayerTrace], matrices: list[LayerMatrix]) -> Tensor:
        if name == "rollout":
            return roll_out([matrix.full() for matrix in matrices])
        if name == "head_N":
            return torch.stack([self.ops.head_maps(layer) for layer in layers], dim=1)
        if name in MIXING:
            return torch.stack([self.ops.mixing_ratio(layer, MIXING[name]) for layer in layers], dim=1)
        return torch.stack([self.ops.norm_matrix(layer, name).full() for layer in layers], dim=1)


def explain_rows(
    who: str, layers: list[LayerTrace], matrices: list[LayerMatrix], targets: Sequence[int] | Tensor, every_layer: bool
) -> RolloutResult:
    """Roll rows out over captured layers, checked: targets as for `GlobEnc`, every_layer its `layers`."""
    last = layers[-1]
    batch, _, n, _ = last.q.shape
    rows = target_rows(who, targets, batch, n, last.key_mask, last.q.device)
    scores, log_scale = roll_out_rows(matrices, rows, every_layer)
    if not (torch.isfinite(scores).all() and torch.isfinite(log_scale).all()):
        raise ValueError(f"{who}: the attribution is not finite; the model's activations hold NaN or infinity for this input")
    if not every_layer:
        return RolloutResult(scores[:, 0], log_scale[:, 0])
    return RolloutResult(scores[:, -1], log_scale[:, -1], scores, log_scale)
