"""The exact `absdot` split of the biases: DecompX's default.

A bias b that is added to the vectors t_ij of row i, one for each source token j, is split in proportion to
|<b, t_ij>|. The shares depend on the vectors, so each source's vectors must be propagated from the bottom up.
Only the sums of |<b, t_ij>| over j join the sources. Three facts keep the memory small:

- The vectors of a tile of J sources, (J, n, d), pass through a layer on their own once its shares are known.
- All five biases of a layer need one sweep over the tiles, not five. Let u_ij be the vector before the first
  bias. The vector before the s-th bias is linear in u_ij and in the shares w_t,ij of the biases t < s. So its
  product with the s-th bias is <c_s,i, u_ij> + sum over t < s of k_st,i w_t,ij, where c and k depend on the
  row alone. The sweep leaves five numbers <c_s,i, u_ij> for each pair, and the shares follow from them.
- Vectors that don't fit the memory allowed are computed again from the bottom for each layer, with the shares
  of the layers below, (5, n, n) each.

A layer takes 10 d^2 + n d multiply-adds for each pair (i, j) of tokens, so all layers take about 0.7 n
forward passes. Sources whose vectors are computed again take about L / 2 times as much, for L layers.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyglobenc.methods.decompx.layers import LinearLayer
from pyglobenc.methods.decompx.states import States

# A tile holds about so many vectors. Larger tiles make no faster matrix products on a CPU.
TILE_VECTORS = 2048


@dataclass
class BiasParts:
    """The parts of a layer's five biases in its output.

    Attributes:
        shares: (5, n, sources), the share of each source in each bias.
        images: (5, n, d), what the rest of the layer makes of each bias.
    """

    shares: Tensor
    images: Tensor

    def add_to(self, t: Tensor, sources: slice) -> Tensor:
        """Add the parts to the layer's output (J, n, d) for a tile of sources, in place."""
        for share, image in zip(self.shares, self.images, strict=True):
            t.addcmul_(share[:, sources].T[..., None], image)
        return t


class AbsDot:
    """The decomposition of one example.

    Args:
        states: tensors of the forward pass.
        number: number of the example.
        memory: bytes that vectors may take from one layer to the next.
    """

    def __init__(self, states: States, number: int, memory: int):
        self.states, self.number = states, number
        self.tokens = states.real[number].nonzero()[:, 0]
        n, d = len(self.tokens), states.top.shape[2]
        step = max(1, TILE_VECTORS // n)
        self.tiles = [slice(start, min(n, start + step)) for start in range(0, n, step)]
        self.kept = memory // (step * n * d * states.top.element_size())
        self.below: list[BiasParts] = []

    def scores(self) -> Tensor:
        """Return the signed scores of the example's real tokens, (n,)."""
        vectors: dict[int, Tensor] = {}
        for index in range(len(self.states.traces) - 1):
            self._ascend(index, vectors)
        return self._head(self._last(vectors))

    def _ascend(self, index: int, vectors: dict[int, Tensor]) -> None:
        """Replace the vectors kept, (J, n, d) by number of the tile, by those of the layer's output."""
        layer = self._layer(index)
        stages = Stages(layer)
        products = layer.x.new_empty(5, len(self.tokens), len(self.tokens))
        for which, tile in enumerate(self.tiles):
            u = layer.attend(self._vectors(vectors.pop(which, None), index, tile), tile)
            products[:, :, tile] = stages.products(u)
            if which < self.kept:
                vectors[which] = layer.after_attention(u)
        parts = stages.parts(products)
        for which, t in vectors.items():
            parts.add_to(t, self.tiles[which])
        if self.kept < len(self.tiles):
            self.below.append(parts)

    def _layer(self, index: int, rows: Tensor | None = None) -> "SourceLayer":
        example = (self.number, self.tokens)
        states = self.states
        given = (states.traces[index], states.slopes[index], states.dtype, example)
        return SourceLayer(*given, rows=rows, first=index == 0)

    def _vectors(self, kept: Tensor | None, index: int, tile: slice) -> Tensor | None:
        """Return a tile's input of a layer, (J, n, d); None for the first layer."""
        if kept is not None:
            return kept
        t, layer = None, None
        for number in range(index):
            # The layer before is freed first, because its probabilities are (H, n, n).
            del layer
            layer = self._layer(number)
            t = self.below[number].add_to(layer.after_attention(layer.attend(t, tile)), tile)
        return t

    def _last(self, vectors: dict[int, Tensor]) -> Tensor:
        """Return the vectors (sources, d) of the weighted sum of tokens that the head reads."""
        head, index = self.states.head, len(self.states.traces) - 1
        tokens = self.tokens.to(head.weights.device)
        read = head.weights[self.number, tokens].nonzero()[:, 0]
        layer = self._layer(index, read)
        stages = Stages(layer)
        scale = head.weights[self.number, tokens[read], None].to(layer.x)
        if head.token_slopes is not None:
            scale = scale * head.token_slopes[self.number, tokens[read]].to(layer.x)
        products, pooled = layer.x.new_empty(5, len(read), len(self.tokens)), []
        for which, tile in enumerate(self.tiles):
            u = layer.attend(self._vectors(vectors.pop(which, None), index, tile), tile)
            products[:, :, tile] = stages.products(u)
            pooled.append((layer.after_attention(u) * scale).sum(1))
        parts = stages.parts(products)
        return torch.cat(pooled) + torch.einsum("snj,snd->jd", parts.shares, parts.images * scale)

    def _head(self, t: Tensor) -> Tensor:
        """Return the scores (sources,) from the vectors (sources, d) that the head reads."""
        head, number = self.states.head, self.number
        *inner, (slopes, (weight, bias)) = head.steps
        t = t.to(weight)
        for below, affine in inner:
            t = (t * below[number]) @ affine.weight
            t = t + shares(t @ affine.bias)[:, None] * affine.bias
        t = t * slopes[number]
        row, own = (each[number] for each in head.explained())
        # The bias of all logits is split as one vector.
        return t @ row + shares(t @ (weight @ bias)) * own


class SourceLayer(LinearLayer):
    """A layer of one example, applied to the vectors (J, n, d) of a tile of source tokens.

    Args:
        rows: the tokens (R,) whose output is wanted; None for all.
        first: whether this is the first layer, whose input has only x_j at row j for each source j.
        The others are those of `LinearLayer`.
    """

    def __init__(self, *layer: Any, rows: Tensor | None, first: bool):
        super().__init__(*layer)
        self.first, self.alpha = first, self.probabilities()
        self.rows = torch.arange(self.x.shape[1], device=self.x.device)
        if rows is not None:
            self.rows = rows.to(self.x.device)
            self.alpha = self.alpha[:, self.rows]
            self.only(self.rows)

    @property
    def attention_bias(self) -> Tensor:
        """Return the bias of the attention's output, (d,). The first layer's values count with their bias."""
        bias = self.output.bias
        return bias if self.first else bias + self.value.bias @ self.output.weight

    def attend(self, t: Tensor | None, sources: slice) -> Tensor:
        """Return the residual sum (J, R, d) of a tile's input t (J, n, d), which the first layer ignores."""
        heads = self.alpha.shape[0]
        if self.first:
            weight = self.output.weight.unflatten(0, (heads, -1))
            f = self.v[0, :, sources] @ weight  # (H, J, d)
            u = self.alpha[:, :, sources].permute(2, 1, 0) @ f.transpose(0, 1)
            own = self.rows == torch.arange(self.x.shape[1], device=u.device)[sources, None]
            return u.addcmul_(own[..., None].to(u), self.x[0, sources, None])
        t = t.to(self.x.device)
        v = (t @ self.value.weight).unflatten(2, (heads, -1))  # (J, n, H, dh)
        o = self.alpha @ v.permute(2, 1, 0, 3).flatten(2)
        o = o.unflatten(2, (len(t), -1)).permute(2, 1, 0, 3).flatten(2)
        return (o @ self.output.weight).add_(t[:, self.rows])

    def after_attention(self, u: Tensor) -> Tensor:
        """Return the layer's output for the residual sum u (J, R, d), without the biases."""
        return self.after_norm(self.norms[0].map(u))


class Stages:
    """How the five biases of a layer act on one another.

    In order, they are those of the attention's output, of its norm, of the MLP's two Linear modules and of
    the last norm.

    Attributes:
        functionals: c of the module's docstring, (5, R, d).
        effects: k of the module's docstring, by (s, t): (R,).
        images: what the rest of the layer makes of each bias, (5, R, d).
    """

    def __init__(self, layer: SourceLayer):
        rows, (first, last) = layer.slopes.shape[1], layer.norms
        attention, beta, units, mlp = (
            layer.attention_bias,
            first.beta,
            layer.intermediate.bias,
            layer.mlp_output.bias,
        )
        # the third to fifth bias, taken back to the MLP's units and to y
        up = layer.intermediate.weight.T
        at_units = [units, *(layer.units_back(g) for g in (mlp.expand(1, rows, -1), last.back(last.beta)))]
        at_y = [at_units[0] @ up, at_units[1] @ up, last.back(last.beta) + at_units[2] @ up]
        at_u = [attention, *(first.back(g) for g in (beta, *at_y))]
        d = layer.x.shape[2]
        self.functionals = torch.stack([g.expand(1, rows, d)[0] for g in at_u])
        self.effects = {(s, 0): self.functionals[s] @ attention for s in range(1, 5)}
        self.effects |= {(s, 1): (at_y[s - 2] @ beta).expand(1, rows)[0] for s in range(2, 5)}
        self.effects |= {(s, 2): (at_units[s - 2] @ units)[0] for s in range(3, 5)}
        self.effects[4, 3] = (last.back(last.beta) @ mlp)[0]
        self.images = torch.cat(
            [
                layer.after_attention(attention.expand(1, rows, d)),
                layer.after_norm(beta.expand(1, rows, d)),
                last.map((units * layer.slopes) @ layer.mlp_output.weight),
                last.map(mlp.expand(1, rows, d)),
                last.beta.expand(1, rows, d),
            ]
        )

    def products(self, u: Tensor) -> Tensor:
        """Return <c, u> for the vectors u (J, R, d) of a tile of sources, (5, R, J)."""
        return torch.einsum("jrd,srd->srj", u, self.functionals)

    def parts(self, products: Tensor) -> BiasParts:
        """Return the parts of the biases; the products (5, R, sources) are overwritten by the shares."""
        for s, own in enumerate(products):
            for t in range(s):
                own.addcmul_(self.effects[s, t][:, None], products[t])
            own.copy_(shares(own))
        return BiasParts(products, self.images)


def shares(products: Tensor) -> Tensor:
    """Return the share (..., sources) of each source in a bias, from its products with the sources' vectors.

    The shares are 0 where all products are 0.
    """
    size = products.abs()
    total = size.sum(-1, keepdim=True)
    return (size / total).masked_fill_(total == 0, 0)
