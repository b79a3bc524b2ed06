"""Handles to one layer's modules and the tensors of one forward pass through them."""

from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass(frozen=True)
class LayerModules:
    """Modules of one transformer layer, by the part they play."""

    block: nn.Module  # called with the layer's input x
    attention: nn.Module  # the module that transformers hands to the attention function
    query: nn.Module
    key: nn.Module
    value: nn.Module
    output: nn.Module  # W_O
    attention_norm: nn.Module  # post-norm: after the attention's residual sum; pre-norm: before the attention
    intermediate: nn.Module  # first Linear of the MLP
    mlp_output: nn.Module
    output_norm: nn.Module  # post-norm: after the MLP's residual sum; pre-norm: before the MLP
    pre_norm: bool = False


@dataclass
class NormStats:
    """Statistics of one LayerNorm in the forward pass, each (B, n); rstd includes eps."""

    mean: Tensor
    rstd: Tensor


@dataclass
class LayerTrace:
    """What one layer saw and computed in the last forward pass; n includes padding."""

    modules: LayerModules
    x: Tensor | None = None  # (B, n, d), the layer's input
    q: Tensor | None = None  # (B, H, n, dh), after rotary embedding
    k: Tensor | None = None  # (B, Hkv, n, dh)
    v: Tensor | None = None  # (B, Hkv, n, dh)
    o: Tensor | None = None  # (B, H, n, dh), attention output by head
    lse: Tensor | None = None  # (B, H, n), of the scaled scores
    scaling: float = 1.0
    key_mask: Tensor | None = None  # (B, n) bool, None: no padding
    window: tuple[int, int] = (-1, -1)
    norms: dict[str, NormStats] = field(default_factory=dict)  # by the field's name in LayerModules

    @property
    def output_weight(self) -> Tensor:
        """W_O by head, (H, dh, d)."""
        heads, dh = self.q.shape[1], self.q.shape[3]
        return self.modules.output.weight.detach().T.unflatten(0, (heads, dh))
