"""The stages of GlobEnc on a captured layer: their constants, norms, maps and mixing ratios."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyglobenc.hf import LayerTrace
from pyglobenc.methods.layer_matrix import NormMatrix
from pyglobenc.ops import gram_kernels, head_gram, head_norms, mixing_ratio
from pyglobenc.reference.stage_map import stage_map


@dataclass(frozen=True)
class Stage:
    """How far through the layer the decomposed vectors are followed."""

    residual: bool
    norms: tuple[str, ...]  # LayerNorms passed, by their name in LayerModules


STAGES = {
    "N": Stage(False, ()),
    "N_Res": Stage(True, ()),
    "N_ResLN": Stage(True, ("attention_norm",)),
    "N_Enc": Stage(True, ("attention_norm", "output_norm")),
}


class StageOps:
    """Builds a layer's norms and ratios of any stage; keeps what depends on the weights alone until they change."""

    def __init__(self, backend: str):
        self.backend = backend
        self._kernels: dict[tuple[nn.Module, tuple[str, ...]], tuple[tuple, Tensor, Tensor]] = {}

    def dtype_of(self, layer: LayerTrace) -> torch.dtype:
        """Of the arithmetic: float64 where the layer is, else float32."""
        return torch.float64 if layer.q.dtype == torch.float64 else torch.float32

    def _gammas(self, layer: LayerTrace, stage: Stage) -> list[Tensor]:
        return [getattr(layer.modules, name).weight.detach().to(self.dtype_of(layer)) for name in stage.norms]

    def kernels(self, layer: LayerTrace, stage: Stage) -> tuple[Tensor, Tensor]:
        """`gram_kernels` of a layer and stage, cached with the versions of the weights they came from."""
        parts = [layer.modules.output, *(getattr(layer.modules, name) for name in stage.norms)]
        dtype = self.dtype_of(layer)
        version = (dtype, *((p.weight.data_ptr(), p.weight._version) for p in parts))
        key = (layer.modules.output, stage.norms)
        if key not in self._kernels or self._kernels[key][0] != version:
            self._kernels[key] = (version, *gram_kernels(layer.output_weight.to(dtype), self._gammas(layer, stage)))
        return self._kernels[key][1:]

    def rstd(self, layer: LayerTrace, stage: Stage) -> Tensor | None:
        """Product of the stage's inverse standard deviations, (B, n)."""
        out = None
        for name in stage.norms:
            rstd = layer.norms[name].rstd.to(self.dtype_of(layer))
            out = rstd if out is None else out * rstd
        return out

    def norm_matrix(self, layer: LayerTrace, name: str) -> NormMatrix:
        """Norms of stage `name`, as a matrix that isn't stored."""
        stage, dtype = STAGES[name], self.dtype_of(layer)
        kernel, cross_kernel = self.kernels(layer, stage)
        cross = residual_sq = None
        if stage.residual:
            x = layer.x.detach().to(dtype)
            gram, cross = head_gram(layer.v.detach().to(dtype), kernel, x, cross_kernel, backend=self.backend)
            residual_sq = stage_map(x, self._gammas(layer, stage)).square().sum(-1)
        else:
            gram, _ = head_gram(layer.v.detach().to(dtype), kernel, backend=self.backend)
        return self._matrix(layer, gram, cross, residual_sq, self.rstd(layer, stage))

    def attention_matrix(self, layer: LayerTrace) -> NormMatrix:
        """Attention averaged over heads: the norm whose Gram matrix is 1/H^2 everywhere."""
        batch, heads, n, _ = layer.q.shape
        gram = torch.full((), heads**-2, dtype=self.dtype_of(layer), device=layer.q.device).expand(batch, n, heads, heads)
        return self._matrix(layer, gram, None, None, None)

    def _matrix(self, layer: LayerTrace, gram, cross, residual_sq, rstd) -> NormMatrix:
        q, k, lse = layer.q.detach(), layer.k.detach(), layer.lse.detach()
        return NormMatrix(q, k, lse, gram, cross, residual_sq, rstd, layer.key_mask, layer.scaling, layer.window, self.backend)

    def head_maps(self, layer: LayerTrace) -> Tensor:
        """head_N: norm of every head's own weighted vector, (B, H, n, n)."""
        dtype = self.dtype_of(layer)
        norms = head_norms(layer.v.detach().to(dtype), layer.output_weight.to(dtype), backend=self.backend).transpose(1, 2)
        maps = self.attention_maps(layer).mul_(norms[:, :, None, :])
        if layer.key_mask is not None:
            maps.masked_fill_(~layer.key_mask[:, None, :, None], 0)
        return maps

    def attention_maps(self, layer: LayerTrace) -> Tensor:
        """Attention probabilities rebuilt from lse, (B, H, n, n)."""
        dtype = self.dtype_of(layer)
        q, k = layer.q.detach().to(dtype), layer.k.detach().to(dtype)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = torch.matmul(q * layer.scaling, k.transpose(2, 3)).sub_(layer.lse.detach().to(dtype)[..., None])
        hidden = self._hidden(layer)
        return (scores if hidden is None else scores.masked_fill_(hidden, float("-inf"))).exp_()

    @staticmethod
    def _hidden(layer: LayerTrace) -> Tensor | None:
        hidden, (left, right) = None, layer.window
        if left >= 0 or right >= 0:
            i = torch.arange(layer.q.shape[2], device=layer.q.device)
            ahead = i[None, :] - i[:, None]
            hidden = ((ahead < -left) & (left >= 0)) | ((ahead > right) & (right >= 0))
        if layer.key_mask is not None:
            padded = ~layer.key_mask[:, None, None, :]
            hidden = padded if hidden is None else hidden | padded
        return hidden

    def mixing_ratio(self, layer: LayerTrace, name: str) -> Tensor:
        """Mixing ratio of stage `name`, (B, n); 0 for padding."""
        stage, dtype = STAGES[name], self.dtype_of(layer)
        gammas = self._gammas(layer, stage)
        q, k, v, o, lse = (t.detach().to(dtype) for t in (layer.q, layer.k, layer.v, layer.o, layer.lse))
        mapped_x = stage_map(layer.x.detach().to(dtype), gammas) if stage.residual else None
        weight = stage_map(layer.output_weight.to(dtype), gammas)
        ratio = mixing_ratio(q, k, v, o, lse, weight, mapped_x, scaling=layer.scaling, backend=self.backend)
        return ratio if layer.key_mask is None else ratio.masked_fill(~layer.key_mask, 0)
