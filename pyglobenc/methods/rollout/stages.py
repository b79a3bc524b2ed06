"""The stages of GlobEnc on a captured layer: their constants, norms, maps and mixing ratios.

A post-norm layer has the four stages of the paper. In a pre-norm layer no LayerNorm follows the residual
sum, so only N and N_Res are defined there. This extends the paper. The transformed vectors of a pre-norm
layer come from the normalised input. They are followed up to what the attention adds to the residual
stream, through a layer scale or an added norm if there is one. The statistic of an added norm is a scale
of its row. The residual is the raw input.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyglobenc.backends.inputs import PairInputs
from pyglobenc.backends.reference.stage_map import stage_map
from pyglobenc.backends.shared.masks import outside_window
from pyglobenc.backends.shared.rows import take_queries
from pyglobenc.backends.shared.score_mods import to_dtype
from pyglobenc.hf import LayerTrace
from pyglobenc.hf.trace.checks import attended_weight
from pyglobenc.hf.weights import dense_bias, parameter
from pyglobenc.methods.rollout.layer_matrix import NormMatrix
from pyglobenc.ops import gram_weights, head_gram, head_norms, mapped_square, mixing_ratio, norm_terms


@dataclass(frozen=True)
class Stage:
    """How far through a layer the decomposed vectors are followed."""

    residual: bool
    norms: tuple[str, ...]  # names in LayerModules of the LayerNorms that are passed


STAGES = {
    "N": Stage(False, ()),
    "N_Res": Stage(True, ()),
    "N_ResLN": Stage(True, ("attention_norm",)),
    "N_Enc": Stage(True, ("attention_norm", "output_norm")),
}


def deepest_stage(layer: LayerTrace) -> str:
    """Return the stage that follows vectors furthest: N_Enc, or N_Res if the layer is pre-norm.

    Args:
        layer: a captured layer, with x (B, n, d). Only the kind of its modules is read.
    """
    return "N_Res" if layer.modules.pre_norm else "N_Enc"


def stages_of(layer: LayerTrace) -> tuple[str, ...]:
    """Return the names of the stages that a layer has.

    Args:
        layer: a captured layer, with x (B, n, d). Only the kind of its modules is read.
    """
    return tuple(name for name, stage in STAGES.items() if not (layer.modules.pre_norm and stage.norms))


def check_stage(who: str, layer: LayerTrace, name: str) -> None:
    """Check that a layer has the stage called `name`.

    Args:
        who: name of the method for errors.
        layer: a captured layer, with x (B, n, d). Only the kind of its modules is read.
        name: a name in STAGES.

    Raises:
        ValueError: it has no such stage.
    """
    if layer.modules.pre_norm and STAGES[name].norms:
        raise ValueError(
            f"{who}: stage {name} follows vectors through a LayerNorm after the residual sum, and this "
            f"model normalises before it; "
            f"its stages are {', '.join(stages_of(layer))}"
        )


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    # `to` takes as long as a small kernel, even if the dtype is the same.
    return t if t.dtype == dtype else t.to(dtype)


class StageOps:
    """Computes a layer's norms, maps and mixing ratios of any stage on one backend.

    Nothing that depends on the weights is kept after a call, since the weights may change.
    """

    def __init__(self, backend: str):
        self.backend = backend

    def dtype_of(self, layer: LayerTrace) -> torch.dtype:
        """Return the dtype of the arithmetic: float64 for a float64 layer, else float32."""
        return torch.float64 if layer.q.dtype == torch.float64 else torch.float32

    def _gammas(self, layer: LayerTrace, stage: Stage) -> list[Tensor]:
        """Return the weights (d,) of the LayerNorms that the stage passes."""
        dtype = self.dtype_of(layer)
        return [_cast(layer.norm_weight(name), dtype) for name in stage.norms]

    def output_weight(self, layer: LayerTrace) -> Tensor:
        """Return W_O by head, (H, dh, d), with the factors that the layer applies before the residual sum."""
        m, dtype = layer.modules, self.dtype_of(layer)
        weight = _cast(layer.output_weight, dtype)
        if m.scale is not None:
            weight = weight * parameter(*m.scale).to(dtype)
        if m.added_norm is not None:
            weight = weight * (parameter(m.added_norm, "weight").to(dtype) + m.unit_offset)
        return weight

    def output_bias(self, layer: LayerTrace) -> Tensor | None:
        """Return the bias of W_O, (d,), with the same factors; None if it has none."""
        dtype, heads = self.dtype_of(layer), layer.q.shape[1] * layer.q.shape[3]
        bias, factor = dense_bias(layer.modules.output, heads), attended_weight(layer.modules)
        if bias is None:
            return None
        return bias.to(dtype) if factor is None else bias.to(dtype) * factor.detach().to(dtype)

    def _residual(self, layer: LayerTrace) -> Tensor:
        """Return the residual x, (B, n, d).

        An added norm scales the attention output alone. Then x is divided by the scale of its row, since the
        whole row is multiplied with it later.
        """
        x = layer.x.detach()
        if layer.modules.added_norm is None:
            return x
        x = x.to(self.dtype_of(layer))
        return x / layer.norms["added_norm"].rstd.to(x.dtype)[..., None]

    def _terms(self, layer: LayerTrace, stage: Stage) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return G (B, n, H, H), c (B, n, H) and |x M|^2 (B, n) of a stage.

        c and |x M|^2 are None for a stage without the residual.
        """
        weight, gammas, v = self.output_weight(layer), self._gammas(layer, stage), layer.v.detach()
        x = self._residual(layer) if stage.residual else None
        # The dtypes differ under autocast, and where x was divided by the scale of an added norm.
        if x is not None and x.dtype != v.dtype:
            v, x = v.to(weight.dtype), x.to(weight.dtype)
        if not self._constants_pay(v, weight, x):
            return norm_terms(v, weight, x, gammas, backend=self.backend)
        kernel, cross_kernel = gram_weights(weight, gammas)
        if x is None:
            return *head_gram(v, kernel, backend=self.backend), None
        gram, cross = head_gram(v, kernel, x, cross_kernel, backend=self.backend)
        return gram, cross, mapped_square(x, gammas, backend=self.backend)

    def _constants_pay(self, v: Tensor, weight: Tensor, x: Tensor | None) -> bool:
        """Tell whether `head_gram` with constants made for this call is cheaper than `norm_terms`.

        The function compares multiply-adds, since both ops run at the same rate on a CPU. Without a residual
        both take the same time at 500 tokens in MiniLM's shape, where the counts are equal at 560. In
        BERT-base's shape the times are equal at 1,400 tokens, and the counts at 1,290. With a residual
        `norm_terms` needs fewer operations at any length in both shapes.
        """
        if self.backend in ("triton", "cuda") or (self.backend == "auto" and v.device.type != "cpu"):
            # The GPU backends have no kernel for norm_terms.
            return True
        (heads, dh, d), tokens = weight.shape, v.shape[0] * v.shape[2]
        width = heads * dh
        direct = tokens * d * (width + heads**2 / 2 + (0 if x is None else heads))
        constants = width**2 * d + tokens * width * (width / 2 + (0 if x is None else d))
        return constants < direct

    def rstd(self, layer: LayerTrace, stage: Stage) -> Tensor | None:
        """Return the product of the inverse standard deviations that scale each row of the stage, (B, n)."""
        out = None
        for name in stage.norms if layer.modules.added_norm is None else ("added_norm",):
            rstd = _cast(layer.norms[name].rstd, self.dtype_of(layer))
            out = rstd if out is None else out * rstd
        return out

    def norm_matrix(self, layer: LayerTrace, name: str) -> NormMatrix:
        """Return the norms of stage `name` as a (B, n, n) matrix that isn't stored.

        Raises:
            ValueError: the layer has no such stage.

        Source: Modarressi et al., 2022, eq. 6 to 10; Kobayashi et al., 2021.
        """
        check_stage("norm_matrix", layer, name)
        stage = STAGES[name]
        return self._matrix(layer, *self._terms(layer, stage), self.rstd(layer, stage))

    def attention_matrix(self, layer: LayerTrace) -> NormMatrix:
        """Return the mean of attention over heads as a (B, n, n) matrix that isn't stored.

        It is the norm whose Gram matrix is 1/H^2 everywhere.
        """
        batch, heads, n, _ = layer.q.shape
        gram = torch.full((), heads**-2, dtype=self.dtype_of(layer), device=layer.q.device).expand(
            batch, n, heads, heads
        )
        return self._matrix(layer, gram, None, None, None)

    def _matrix(self, layer: LayerTrace, gram, cross, residual_sq, rstd) -> NormMatrix:
        q, k, lse = layer.q.detach(), layer.k.detach(), layer.lse.detach()
        score_mod = None if layer.score_mod is None else to_dtype(layer.score_mod, gram.dtype)
        seen = (layer.key_mask, layer.scaling, layer.window, layer.cu_seqlens, score_mod)
        return NormMatrix(PairInputs(q, k, lse, gram, cross, residual_sq, rstd, *seen), self.backend)

    def head_maps(self, layer: LayerTrace) -> Tensor:
        """Return head_N, the norm of every head's weighted vector, (B, H, n, n), 0 in rows of padding.

        Source: Kobayashi et al., 2020.
        """
        dtype = self.dtype_of(layer)
        norms = head_norms(
            layer.v.detach().to(dtype), self.output_weight(layer), backend=self.backend
        ).transpose(1, 2)
        maps = self.attention_maps(layer).mul_(norms[:, :, None, :])
        if layer.modules.added_norm is not None:
            maps.mul_(self.rstd(layer, STAGES["N"])[:, None, :, None])
        if layer.key_mask is not None:
            maps.masked_fill_(~layer.key_mask[:, None, :, None], 0)
        return maps

    def attention_maps(self, layer: LayerTrace) -> Tensor:
        """Return the attention probabilities (B, H, n, n), computed again from lse."""
        everything = slice(0, layer.q.shape[2])
        return self.attention_tile(layer, everything, everything)

    def attention_tile(self, layer: LayerTrace, rows: slice | Tensor, cols: slice) -> Tensor:
        """Return the attention probabilities of m queries and a range of keys, (B, H, m, cols).

        They are computed again from q (B, H, n, dh), k and lse. Keys that a query does not see get 0. rows is
        a range of queries, or their positions (B, m).
        """
        dtype, mod, device = self.dtype_of(layer), layer.score_mod, layer.q.device
        if isinstance(rows, Tensor):
            q, lse, i = take_queries(layer.q, rows), take_queries(layer.lse, rows), rows
        else:
            q, lse = layer.q[:, :, rows], layer.lse[:, :, rows]
            i = torch.arange(rows.start, rows.stop, device=device)[None]
        q, lse = q.detach().to(dtype), lse.detach().to(dtype)
        # A bias may depend on the number of all keys.
        k = (layer.k if mod is not None else layer.k[:, :, cols]).detach().to(dtype)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        seen = k if mod is None else k[:, :, cols]
        scores = torch.matmul(q * layer.scaling, seen.transpose(2, 3))
        if mod is not None:
            scores = mod.bind(q, k)(scores, slice(0, q.shape[2]), i, cols)
        scores -= lse[..., None]
        ahead = torch.arange(cols.start, cols.stop, device=device) - i[..., None]
        hidden = outside_window(ahead, layer.window)
        if hidden is not None:
            scores.masked_fill_(hidden[:, None], float("-inf"))
        if layer.key_mask is not None:
            scores.masked_fill_(~layer.key_mask[:, None, None, cols], float("-inf"))
        return scores.exp_()

    def mixing_ratio(self, layer: LayerTrace, name: str) -> Tensor:
        """Return the mixing ratio of stage `name`, (B, n), 0 at padding.

        Raises:
            ValueError: the layer has no such stage.

        Source: Kobayashi et al., 2021, eq. 7.
        """
        check_stage("mixing_ratio", layer, name)
        stage, dtype = STAGES[name], self.dtype_of(layer)
        gammas = self._gammas(layer, stage)
        q, k, v, o, lse = (t.detach().to(dtype) for t in (layer.q, layer.k, layer.v, layer.o, layer.lse))
        mapped_x = stage_map(self._residual(layer).to(dtype), gammas) if stage.residual else None
        weight = stage_map(self.output_weight(layer), gammas)
        score_mod = None if layer.score_mod is None else to_dtype(layer.score_mod, dtype)
        settings = dict(scaling=layer.scaling, score_mod=score_mod, backend=self.backend)
        ratio = mixing_ratio(q, k, v, o, lse, weight, mapped_x, **settings)
        return ratio if layer.key_mask is None else ratio.masked_fill(~layer.key_mask, 0)
