"""GlobEnc: norms of decomposed vectors through the whole layer, rolled out (Modarressi et al., 2022)."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyglobenc.common.arguments import known_arguments
from pyglobenc.common.autocast import outside_autocast
from pyglobenc.hf import LayerTrace, find_layers
from pyglobenc.methods.arguments import check_maps, model_inputs, packed_inputs
from pyglobenc.methods.inputs import check_model, require_finite, run_captured
from pyglobenc.methods.packing import attribute_packed
from pyglobenc.methods.precision.reliability import distance, nudged, warn_of_precision
from pyglobenc.methods.rollout.layer_matrix import LayerMatrix, StoredMatrix
from pyglobenc.methods.rollout.rows import (
    RolloutResult,
    roll_out,
    roll_out_rows,
    rollout_result,
    stack_layers,
)
from pyglobenc.methods.rollout.stages import STAGES, StageOps, check_stage, deepest_stage
from pyglobenc.methods.target_tokens import target_rows

MIXING = {f"mix_{name}": name for name in STAGES}
MAPS = ("head_N", *STAGES, *MIXING, "rollout")


class GlobEnc:
    """GlobEnc attribution of a stock transformers model (Modarressi et al., NAACL 2022).

    Args:
        model: a model of a known architecture, in evaluation mode. It is left unchanged. It may be wrapped
            by torch.compile, PEFT or sentence-transformers, or be part of a module with its own head.
        backend: "auto", "reference", "cpu", "triton" or "cuda".
        dtype: dtype of the attribution arithmetic. None means float32, or float64 for a float64 model.

    Raises:
        TypeError, ValueError: The architecture or backend is unknown, or the model is in training mode.
    """

    @known_arguments
    def __init__(self, model: nn.Module, backend: str = "auto", dtype: torch.dtype | None = None):
        self.model = check_model("GlobEnc", model, backend, dtype)
        self.dtype = dtype
        self.ops = StageOps(backend)

    @known_arguments
    @outside_autocast
    @torch.no_grad()
    def __call__(
        self,
        *,
        targets: Sequence[int] | Tensor | str | None = None,
        stage: str | None = None,
        layers: bool = False,
        maps: Sequence[str] = (),
        reliability: str = "off",
        **batch: Any,
    ) -> RolloutResult:
        """Attribute target tokens of a batch to the input tokens.

        Row mode is the default. It stores no (n, n) array, so memory is O(L*n*d + T*n). Each map that is
        asked for takes memory of its own size.

        Args:
            targets: T token positions for every example, or (B, T). Position 0 is [CLS]. "mean" explains the
                mean of the rows of all real tokens, T = 1. None is the default target. If the model returns
                one set of logits an example, it is the token, or the mean of tokens, that the logits are
                computed from. For other models it is the first real token, or the last one if the model is
                causal. The same holds for the heads of transformers that read neither one token nor the mean
                of all tokens. Other heads of this kind are refused.
            stage: the stage whose norms are rolled out: "N", "N_Res", "N_ResLN" or "N_Enc". None means N_Enc.
                A pre-norm model only has N and N_Res, and None means N_Res. This extends the paper.
            layers: whether to also return the rollout up to every layer.
            maps: names of maps to return. "head_N" is (B, L, H, n, n). "N", "N_Res", "N_ResLN" and "N_Enc"
                are (B, L, n, n). "mix_" followed by the name of a stage is (B, L, n). "rollout" is (B, n, n)
                in float64, not normalised. Rows of padding are 0.
            reliability: "off" or "measured". With "measured" the model runs a second time, with every layer's
                input and the outputs of its Linear modules moved by one rounding unit. `error` tells how
                far the scores moved. A PrecisionWarning is given if it is above 1e-2 or unknown (NaN), as
                happens for half-precision models with large attention scores. With "off" the error of a
                model in half precision is unknown: `error` is NaN, and a PrecisionWarning says so.
            batch: the inputs of the model, as its tokenizer returns them: input_ids or inputs_embeds,
                attention_mask, token_type_ids, position_ids, pixel_values, interpolate_pos_encoding.
                output_hidden_states and logits_to_keep change what `output` holds.

        Returns:
            RolloutResult with scores (B, T, n).

        Raises:
            TypeError, ValueError: An argument, the stage or a map is unknown. An argument can't be honoured.
                A target is out of range or padding. The input is longer than the model takes, or an example
                has no real token. The result isn't finite; this error names the parameter that holds NaN or
                infinity.

        Source: Modarressi et al., 2022.
        """
        batch = model_inputs("GlobEnc", self.model, batch, GlobEnc.__call__)
        if stage is not None and stage not in STAGES:
            raise ValueError(f"GlobEnc: stage must be one of {', '.join(STAGES)}, got {stage!r}")
        check_maps("GlobEnc", maps, MAPS)
        if reliability not in ("off", "measured"):
            raise ValueError(f"GlobEnc: reliability must be 'off' or 'measured', got {reliability!r}")
        captured, output, read = run_captured("GlobEnc", self.model, batch, self.dtype, targets)
        stage = stage or deepest_stage(captured[-1])
        for name in (stage, *(MIXING.get(name, name) for name in maps if MIXING.get(name, name) in STAGES)):
            check_stage("GlobEnc", captured[-1], name)
        rows = target_rows("GlobEnc", targets, captured[-1], read)
        full = self._full(captured, stage) if stage in maps or "rollout" in maps else None
        if full is None:
            matrices: Iterable[LayerMatrix] = (
                self.ops.norm_matrix(layer, stage) for layer in reversed(captured)
            )
        else:
            matrices = [StoredMatrix(matrix) for matrix in reversed(full)]
        rolled, unmeasured = roll_out_rows(matrices, rows, layers), captured if reliability == "off" else ()
        result = rollout_result("GlobEnc", self.model, *rolled, layers, unmeasured)
        result.output, result.targets = output, None if rows.is_floating_point() else rows
        if reliability == "measured":
            result.error = self._measured_error(batch, stage, rows, result.scores)
        for name in maps:
            if name == "rollout":
                result.maps[name] = roll_out(full)
            else:
                result.maps[name] = stack_layers(full if name == stage else self._maps(name, captured))
        if maps:
            # Maps also hold rows of other tokens. These may hold NaN even if the rows of the targets don't.
            require_finite("GlobEnc", self.model, result.maps.values())
        return result

    @known_arguments
    @outside_autocast
    @torch.no_grad()
    def packed(
        self,
        *,
        targets: Sequence[int] | Tensor | str | None = None,
        stage: str | None = None,
        layers: bool = False,
        **batch: Any,
    ) -> list[RolloutResult]:
        """Attribute target tokens of sequences of any lengths, packed end to end so that nothing is padded.

        Args:
            targets: T token positions for every sequence, or (S, T). "mean" and None mean the same as for a
                batch.
            stage, layers: the same as for a batch.
            batch: the inputs of S sequences. Each input is a list with one list of ids per sequence, as the
                model's tokenizer returns it when it is asked for neither padding nor tensors.

        Returns:
            S results of batch size 1, in the order of the sequences. Each one equals the result of its
            sequence alone. `output` is None unless the model returns one set of logits for a sequence.

        Raises:
            TypeError, ValueError: as for a batch, or the model can't be given the positions of packed
                sequences.
        """
        batch = packed_inputs("GlobEnc", batch, GlobEnc.packed)
        if stage is not None and stage not in STAGES:
            raise ValueError(f"GlobEnc: stage must be one of {', '.join(STAGES)}, got {stage!r}")

        def rows(captured: list[LayerTrace], positions: Tensor) -> tuple[Tensor, Tensor]:
            name = stage or deepest_stage(captured[-1])
            check_stage("GlobEnc", captured[-1], name)
            matrices = (self.ops.norm_matrix(layer, name) for layer in reversed(captured))
            return roll_out_rows(matrices, positions, layers, captured[-1].cu_seqlens)

        return attribute_packed("GlobEnc", self.model, batch, targets, self.dtype, layers, rows)

    def _measured_error(self, batch: dict[str, Any], stage: str, rows: Tensor, scores: Tensor) -> Tensor:
        """Return the relative L2 distance (B,) between scores (B, T, n) and those of a nudged second run."""
        with nudged(find_layers(self.model)):
            captured, _, _ = run_captured("GlobEnc", self.model, batch, self.dtype)
        moved, _ = roll_out_rows((self.ops.norm_matrix(layer, stage) for layer in reversed(captured)), rows)
        error = distance(moved[:, 0], scores, None)
        error = error.masked_fill(error == 0, float("nan"))
        warn_of_precision("GlobEnc", error, None, "measured", "run the model in float32")
        return error

    def _full(self, captured: list[LayerTrace], stage: str) -> list[Tensor]:
        return [self.ops.norm_matrix(layer, stage).full() for layer in captured]

    def _maps(self, name: str, captured: list[LayerTrace]) -> list[Tensor]:
        if name == "head_N":
            return [self.ops.head_maps(layer) for layer in captured]
        if name in MIXING:
            return [self.ops.mixing_ratio(layer, MIXING[name]) for layer in captured]
        return self._full(captured, name)
