"""Extends the forward pass of a stock classifier with norms and the GlobEnc rollout, in published order."""

from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutput

from pyglobenc.hf import LayerTrace
from pyglobenc.methods.inputs import check_model, require_finite, run_captured
from pyglobenc.methods.rollout.rows import roll_out
from pyglobenc.methods.rollout.stages import STAGES, StageOps

# A layer's norms in the published order: those of single heads, the four stages, the four mixing ratios.
NORMS = ("head_N", *STAGES, *(f"mix_{name}" for name in STAGES))


@dataclass
class GlobEncOutput(SequenceClassifierOutput):
    """`SequenceClassifierOutput` with the rollout and the norms.

    The published code returns these in tuples only.

    Attributes:
        globenc: the rollout of N_Enc, (B, n, n), not normalised.
        norms: for each layer a tuple in the order of NORMS: head_N (B, H, n, n), four maps (B, n, n), and
            four ratios (B, n).
    """

    globenc: Tensor | None = None
    norms: tuple[tuple[Tensor, ...], ...] | None = None


class WithNorms:
    """Mixin for a stock classifier, whose `forward` then takes `output_norms` and `output_globenc`."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        output_norms: bool | None = None,
        output_globenc: bool | None = None,
        **kwargs: Any,
    ) -> tuple | SequenceClassifierOutput:
        """Run the stock forward pass, and compute norms and the rollout if they are asked for.

        The arguments that are not listed here are those of the stock model, in the published order.

        Args:
            input_ids: (B, n) int64.
            head_mask: must be None.
            output_norms: also return the nine norms and ratios of each layer.
            output_globenc: also return the rollout of N_Enc, (B, n, n).

        Returns:
            `GlobEncOutput`. With return_dict=False, a tuple of the loss, logits, hidden states, attentions,
            rollout and norms, without those that were not asked for. Rows of padding are 0. As in the
            published code, output_attentions with output_globenc but without output_norms gives each layer's
            N_Enc instead of its attention.

        Raises:
            ValueError: head_mask is given, or the model cannot take the input.
        """
        if head_mask is not None:
            raise ValueError(f"{type(self).__name__}: head_mask is not supported; transformers 5 has none")
        given = dict(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
        )
        given |= dict(
            inputs_embeds=inputs_embeds, labels=labels, output_hidden_states=output_hidden_states, **kwargs
        )
        batch = {name: value for name, value in given.items() if value is not None}
        batch["output_attentions"] = False
        as_dict = self.config.return_dict if return_dict is None else return_dict
        attentions = self.config.output_attentions if output_attentions is None else output_attentions
        if not (output_norms or output_globenc or attentions):
            return super().forward(**batch, return_dict=as_dict)
        name, ops = type(self).__name__, StageOps("auto")
        check_model(name, self, "auto", None)
        captured, output, _ = run_captured(name, self, {**batch, "return_dict": True}, None)
        with torch.no_grad():
            found = _found(
                ops, captured, bool(attentions), bool(output_norms), bool(output_globenc), self.dtype
            )
        seen, rollout, norms = found
        require_finite(
            name, self, [t for t in (*(seen or ()), rollout, *chain(*(norms or ()))) if t is not None]
        )
        parts = (output.loss, output.logits, output.hidden_states, *found)
        return GlobEncOutput(*parts) if as_dict else tuple(part for part in parts if part is not None)


def _found(
    ops: StageOps,
    captured: list[LayerTrace],
    attentions: bool,
    norms: bool,
    globenc: bool,
    dtype: torch.dtype,
) -> tuple[tuple | None, Tensor | None, tuple | None]:
    """Return the attentions, the rollout and the norms; None for each that was not asked for."""
    seen = (
        tuple(ops.attention_maps(layer).to(dtype) for layer in captured)
        if attentions and (norms or not globenc)
        else None
    )
    if not (norms or globenc):
        return seen, None, None
    maps = tuple(ops.norm_matrix(layer, "N_Enc").full().to(dtype) for layer in captured)
    if attentions and not norms:
        seen = maps
    rollout = roll_out(maps).to(dtype) if globenc else None
    if not norms:
        return seen, rollout, None
    by_layer = zip(captured, maps, strict=True)
    return (
        seen,
        rollout,
        tuple(tuple(_norm(ops, layer, name, n_enc).to(dtype) for name in NORMS) for layer, n_enc in by_layer),
    )


def _norm(ops: StageOps, layer: LayerTrace, name: str, n_enc: Tensor) -> Tensor:
    if name == "N_Enc":
        return n_enc
    if name == "head_N":
        return ops.head_maps(layer)
    if name.startswith("mix_"):
        return ops.mixing_ratio(layer, name.removeprefix("mix_"))
    return ops.norm_matrix(layer, name).full()
