"""Baselines of the published code that read attention without relevance: raw attention, attention rollout, Grad-CAM on attention."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyglobenc.backends.shared.relevance_tiles import probability_tiles
from pyglobenc.backends.shared.rows import take_queries
from pyglobenc.hf import LayerTrace


def attention_row(layer: LayerTrace, row: Tensor) -> Tensor:
    """Attention of tokens, averaged over heads, times their shares `row` (B, 1, n): (B, n)."""
    row = row.to(layer.q.device)
    return sum(row[:, :, rows] @ alpha.mean(1) for rows, _, alpha in _tiles(layer))[:, 0]


def roll_out_attention(layers: Sequence[LayerTrace], row: Tensor) -> Tensor:
    """Rollout of head-averaged attention, rows of I + A divided by their sum: row (B, 1, n) of a unit vector -> (B, n)."""
    for layer in reversed(layers):
        row = row.to(layer.q.device)
        out = torch.zeros_like(row)
        for rows, _, alpha in _tiles(layer):
            attention = alpha.mean(1)
            weights = row[:, :, rows] / (1 + attention.sum(-1))[:, None]
            out += weights @ attention
            out[:, :, rows] += weights
        row = out
    return row[:, 0]


def grad_cam(layer: LayerTrace, grad_o: Tensor, row: Tensor) -> Tensor:
    """Grad-CAM on attention as published for BERT: tokens' shares `row` (B, 1, n) times the map scaled to [0, 1] over all its entries,
    (B, n).

    The mean gradient of a head has a closed form, <sum_i grad_o[i], sum_j v[j]> / n^2. Padding is left out of the mean and of the
    extremes, so that a padded example gets the values it has alone.
    """
    mask, row = layer.key_mask, row.to(layer.q.device)
    v = layer.v if mask is None else layer.v * mask[:, None, :, None]
    count = layer.q.shape[2] if mask is None else mask.sum(1).to(v.dtype)[:, None]
    weights = (grad_o.sum(2) * v.sum(2)).sum(-1) / count**2
    low = high = read = None
    for rows, _, alpha in _tiles(layer):
        cam = (alpha * weights[:, :, None, None]).mean(1).clamp_(min=0)
        hidden = torch.zeros_like(cam, dtype=torch.bool) if mask is None else ~(mask[:, rows, None] & mask[:, None])
        least = cam.masked_fill(hidden, float("inf")).amin((1, 2))
        most = cam.masked_fill(hidden, 0).amax((1, 2))
        low = least if low is None else torch.minimum(low, least)
        high = most if high is None else torch.maximum(high, most)
        part = (row[:, :, rows] @ cam)[:, 0]
        read = part if read is None else read + part
    return _scale(read, low[:, None], high[:, None], mask)


def grad_cam_patches(layer: LayerTrace, grad_o: Tensor, prefix: int) -> Tensor:
    """Grad-CAM on attention as published for ViT: the [CLS] row over the patches, its mean gradient theirs, (B, patches)."""
    position = torch.zeros(layer.q.shape[0], dtype=torch.long, device=layer.q.device)
    weights = (grad_o[:, :, 0] * layer.v[:, :, prefix:].mean(2)).sum(-1)
    q, lse = take_queries(layer.q, position[:, None]), take_queries(layer.lse, position[:, None])
    alpha = next(probability_tiles(q, layer.k, lse, None, layer.scaling, layer.window, position[:, None]))[2]
    cam = (alpha[:, :, 0, prefix:] * weights[..., None]).mean(1).clamp_(min=0)
    return _scale(cam, cam.amin(1, keepdim=True), cam.amax(1, keepdim=True), None)


def _tiles(layer: LayerTrace):
    return probability_tiles(layer.q, layer.k, layer.lse, layer.key_mask, layer.scaling, layer.window)


def _scale(t: Tensor, low: Tensor, high: Tensor, mask: Tensor | None) -> Tensor:
    """(t - low) / (high - low), 0 where they are equal and for padding."""
    scaled = torch.where(high > low, (t - low) / (high - low), torch.zeros_like(t))
    return scaled if mask is None else scaled.masked_fill(~mask, 0)
