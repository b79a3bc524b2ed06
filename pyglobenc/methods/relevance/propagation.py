"""Propagates relevance from the explained logit down the layers, and collects what the variants need."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyglobenc.backends.shared.packing import slices, take
from pyglobenc.methods.relevance.layers import below_attention, down_to_attention, head_relevance
from pyglobenc.methods.relevance.rules import Rules
from pyglobenc.methods.relevance.states import States
from pyglobenc.ops import relevance_maps

HEAD_MAPS = ("alpha", "R_alpha", "grad_alpha")
ROW_BLOCK = 64
MAPS = ("map", *HEAD_MAPS, "R_in")


class RelevancePropagation:
    """One pass of relevance from the top layer down.

    Args:
        states: tensors of the forward pass.
        rules: the relevance rules.
        gradient: multiply the maps by the gradient of the logit.
        normalize: divide the rows of I + A by their sums, as the published BERT code does.

    Attributes:
        token_sums: (B, n) for each layer number, the relevance of the layer's input summed over the hidden
            size. The entry whose key is the number of layers is that of the last layer's output.
        maps: the maps kept, by name in MAPS and then by layer number.
    """

    def __init__(self, states: States, rules: Rules, gradient: bool, normalize: bool):
        self.states = states
        self.rules = rules
        self.gradient = gradient
        self.normalize = normalize
        self.token_sums: dict[int, Tensor] = {}
        self.maps: dict[str, dict[int, Tensor]] = defaultdict(dict)

    def start_row(self) -> Tensor:
        """Return the row that a rollout starts from, (B, 1, n): each token's share in what the head reads."""
        return self.states.packed(self.states.head.shares)[:, None].to(self.states.layers[-1].x.device)

    def roll_out(
        self, start_layer: int, lowest: int, names: tuple[str, ...] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """Roll out the maps from the top layer down to start_layer, and propagate relevance on the way.

        Args:
            start_layer: the lowest layer whose map takes part; the number of layers for none.
            lowest: the lowest layer through which relevance is propagated. With start_layer + 1, the layer
                start_layer gives its map only.
            names: names in MAPS of the maps to keep.

        Returns:
            The row of the rollout, (B, n), and the relevance of the input of layer `lowest`, (B, n, d). The
            relevance is None if start_layer is below `lowest`.
        """
        states, rules, depth = self.states, self.rules, len(self.states.layers)
        roll, r = self.start_row(), head_relevance(states, rules)
        self.token_sums[depth] = r.sum(-1)
        for index in reversed(range(min(start_layer, lowest), depth)):
            layer = states.layers[index]
            grad = states.grads[index] if self.gradient else None
            s, residual = down_to_attention(states, index, r, rules)
            self._keep(names, index, s)
            roll, rolling = roll.to(layer.x.device), index >= start_layer
            if index < lowest:
                return rules.roll(layer, grad, s, roll, self.normalize)[:, 0], None
            parts, rolled = rules.attention(layer, grad, s, roll if rolling else None, self.normalize)
            roll = rolled if rolling else roll
            r = below_attention(states, residual, parts, rules)
            self.token_sums[index] = r.sum(-1)
            if "R_in" in names:
                self.maps["R_in"][index] = r
        return roll[:, 0], r

    def layer_row(self, index: int) -> Tensor:
        """Return the row of the tokens that the head reads in the map of one layer, (B, n)."""
        _, r = self.roll_out(len(self.states.layers), index + 1)
        s, _ = down_to_attention(self.states, index, r, self.rules)
        return self._own_row(index, s)[:, 0]

    def _own_row(self, index: int, s: Tensor) -> Tensor:
        """Return the row of the tokens that the head reads in the map of one layer, (B, 1, n)."""
        tensors, options = self._map_arguments(index, s)
        cu_seqlens, start = self.states.layers[index].cu_seqlens, self.start_row().to(s.device)
        if cu_seqlens is None:
            return self._share(tensors, options, start)
        rows = []
        for tokens in slices(cu_seqlens):
            *own, share = take([*tensors, start], [2] * (len(tensors) + 1), tokens)
            rows.append(self._share(own, options, share))
        return torch.cat(rows, 2)

    def _share(self, tensors: Sequence[Tensor | None], options: dict[str, Any], start: Tensor) -> Tensor:
        """Return the tokens' shares, start (B, 1, n), times the map of one layer: (B, 1, n).

        The map is computed ROW_BLOCK rows at a time, or only at the token that the head reads.
        """
        if self.states.head.position is not None:
            return relevance_maps(*tensors, rows=start[:, 0].argmax(1, keepdim=True), **options)
        blocks = torch.arange(start.shape[2], device=start.device).expand(len(start), -1).split(ROW_BLOCK, 1)
        return sum(
            start.gather(2, rows[:, None]) @ relevance_maps(*tensors, rows=rows, **options) for rows in blocks
        )

    def _map_arguments(self, index: int, s: Tensor) -> tuple[tuple[Tensor | None, ...], dict[str, Any]]:
        """Return the tensors and the options with which `relevance_maps` computes a layer's map."""
        layer, grad = self.states.layers[index], self.states.grads[index] if self.gradient else None
        options = dict(
            key_mask=layer.key_mask, scaling=layer.scaling, window=layer.window, backend=self.rules.backend
        )
        return (layer.q, layer.k, layer.v, layer.lse, grad, s), options

    def _keep(self, names: tuple[str, ...], index: int, s: Tensor) -> None:
        if "map" in names:
            tensors, options = self._map_arguments(index, s)
            self.maps["map"][index] = relevance_maps(*tensors, **options)
        if set(names) & set(HEAD_MAPS):
            for name, value in self._head_maps(index, s).items():
                if name in names:
                    self.maps[name][index] = value

    def _head_maps(self, index: int, s: Tensor) -> dict[str, Tensor]:
        """Return alpha, R_alpha and the gradient of alpha, each (B, H, n, n), by name."""
        layer = self.states.layers[index]
        alpha = (layer.q @ layer.k.transpose(2, 3)).mul_(layer.scaling).sub_(layer.lse[..., None]).exp_()
        if layer.key_mask is not None:
            alpha.masked_fill_(~layer.key_mask[:, None, None, :], 0)
        values = layer.v.transpose(2, 3)
        return {
            "alpha": alpha,
            "R_alpha": alpha * (s @ values) / 2,
            "grad_alpha": self.states.grads[index] @ values,
        }
