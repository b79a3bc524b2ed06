"""Arguments that several ops share: one frozen dataclass for each family of ops.

`pyglobenc.ops` makes and checks them, and every backend receives them whole. torch.library accepts flat
arguments only; `flat`, `from_flat` and `schema` translate.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar, get_type_hints

import torch
from torch import Tensor

from pyglobenc.backends.shared.score_mods import ScoreMod

Own = TypeVar("Own", bound="Inputs")

# The type in a torch.library schema for each Python type of a field.
SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", bool: "bool"}


class Inputs:
    """Base class of `PairInputs` and `RelevanceInputs`; the first field is q."""

    # The axis of the tokens, for each tensor that has one.
    AXES: ClassVar[dict[str, int]]

    @property
    def device(self) -> torch.device:
        """Return the device of q."""
        return self.q.device

    def reference_alone(self) -> list[str]:
        """Return the reasons why no compiled backend can run; only the reference computes these cases."""
        return [] if self.score_mod is None else ["has no kernel for scores with a bias or a soft cap"]

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are not None, by name."""
        return {
            name: value
            for name, value in vars(self).items()
            if isinstance(value, Tensor) and name != "cu_seqlens"
        }

    def of_tokens(self) -> dict[str, Tensor]:
        """Return the tensors with an axis over the tokens, by name; None is left out."""
        return {name: getattr(self, name) for name in self.AXES if getattr(self, name) is not None}

    def arguments(self) -> dict[str, Any]:
        """Return all fields by name, as the keyword arguments of the ops."""
        return dict(vars(self))

    def replace(self: Own, **changes: Any) -> Own:
        """Return a copy with other values for some fields."""
        return replace(self, **changes)

    @classmethod
    def schema(cls) -> str:
        """Return the arguments of a torch.library schema. A score_mod has no type there and is left out."""
        hints = get_type_hints(cls)
        named = [(f.name, hints[f.name]) for f in fields(cls) if f.name != "score_mod"]
        return ", ".join(
            "SymInt left, SymInt right" if name == "window" else f"{SCHEMA_TYPES[kind]} {name}"
            for name, kind in named
        )

    def flat(self) -> tuple[Any, ...]:
        """Return the values of the arguments that `schema` lists."""
        out: list[Any] = []
        for name, value in vars(self).items():
            if name == "window":
                out += value
            elif name != "score_mod":
                out.append(value)
        return tuple(out)

    @classmethod
    def from_flat(cls: type[Own], values: tuple[Any, ...]) -> tuple[Own, tuple[Any, ...]]:
        """Return the inputs that the first values make up, and the remaining values."""
        left = iter(values)
        made = {
            f.name: (next(left), next(left)) if f.name == "window" else next(left)
            for f in fields(cls)
            if f.name != "score_mod"
        }
        return cls(**made), tuple(left)


@dataclass(frozen=True)
class PairInputs(Inputs):
    """Tensors of one layer from which the norms of its (query, key) pairs are computed.

    Attributes:
        q: queries, (B, H, n, dh), any float dtype; the arithmetic is in the dtype of gram.
        k: keys, (B, Hkv, n, dh), H a multiple of Hkv; the dtype of q.
        lse: log-sum-exp of each query's scaled scores, natural logarithm, (B, H, n), any float dtype.
        gram: G of `head_gram`, (B, n, H, H), float32 or float64; so are cross, residual_sq and rstd.
        cross: c of `head_gram`, (B, n, H), or None for a stage without residual.
        residual_sq: squared norm of the mapped residual x[i] M, (B, n); given together with cross.
        rstd: scale of each row, the product of the stage's inverse standard deviations, (B, n), or None for
            1.
        key_mask: (B, n) bool, True for real tokens; rows and columns of the others are 0. None: all real.
        scaling: factor of q . k.
        window: (left, right): query i sees the keys i - left to i + right. -1 is unlimited, and (-1, 0) is
            causal.
        cu_seqlens: (S + 1,) int32 on the CPU, for S sequences packed into one. Sequence s is tokens
            cu_seqlens[s] to cu_seqlens[s + 1]; B is 1 and key_mask is None. None: the sequences are not
            packed.
        score_mod: change of the scaled scores before the softmax; only the reference computes it.
    """

    AXES = {"q": 2, "k": 2, "lse": 2, "gram": 1, "cross": 1, "residual_sq": 1, "rstd": 1}

    q: Tensor
    k: Tensor
    lse: Tensor
    gram: Tensor
    cross: Tensor | None
    residual_sq: Tensor | None
    rstd: Tensor | None
    key_mask: Tensor | None
    scaling: float
    window: tuple[int, int]
    cu_seqlens: Tensor | None = None
    score_mod: ScoreMod | None = None


@dataclass(frozen=True)
class RelevanceInputs(Inputs):
    """Tensors of one layer's attention through which relevance is propagated.

    Attributes:
        q, k, v: (B, H, n, dh), float32 or float64.
        lse: log-sum-exp of each query's scaled scores, natural logarithm, (B, H, n), the dtype of q.
        grad_o: gradient of the explained logit with respect to the attention output, (B, H, n, dh). If it is
            None, the maps are not multiplied by a gradient.
        s: relevance of the attention output over safe(that output), (B, H, n, dh).
        key_mask: (B, n) bool, True for real tokens; None: all.
        scaling: factor of q . k.
        window: (left, right), as in `PairInputs`.
        additive_mask: the model adds a mask to the scores, as BERT does. The add rule applies to that sum.
        normalize: divide each row of I + A by its sum in a rollout step.
        stabilizer: 0 for the published guard of the division by t = q . k. With e > 0 the divisor is
            t + e * sign(t).
        rescale: apply the factor c of the additive mask. False is the LRP baseline's rule; only the reference
            computes it.
        cu_seqlens, score_mod: as in `PairInputs`.
    """

    AXES = {"q": 2, "k": 2, "v": 2, "lse": 2, "grad_o": 2, "s": 2}

    q: Tensor
    k: Tensor
    v: Tensor
    lse: Tensor
    grad_o: Tensor | None
    s: Tensor
    key_mask: Tensor | None
    scaling: float
    window: tuple[int, int]
    additive_mask: bool = False
    normalize: bool = False
    stabilizer: float = 0.0
    rescale: bool = True
    cu_seqlens: Tensor | None = None
    score_mod: ScoreMod | None = None

    def reference_alone(self) -> list[str]:
        """Return the reasons why no compiled backend can run; only the reference computes these cases."""
        reasons = super().reference_alone()
        if not self.rescale:
            reasons.append("has no kernel for the LRP baseline's rule of an additive mask")
        return reasons
