"""GlobEnc as published: all decomposed vectors, from the model's eager attention and hidden states."""

from collections import defaultdict
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from pyglobenc.hf import find_layers


class Float64Throughout(TorchFunctionMode):
    """Computes in float64 what models compute in float32 whatever their dtype: softmax, RMSNorm, rotation."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        dtype = args[0].dtype if args and isinstance(args[0], Tensor) else None
        narrows = func is Tensor.float or (
            func is Tensor.to and torch.float32 in (*args[1:], *kwargs.values())
        )
        # Positions are integers that are converted to angles.
        if narrows and dtype in (torch.float64, torch.int64):
            return args[0].double()
        wide = dtype == torch.float64
        if (
            wide
            and func in (nn.functional.softmax, torch.softmax, Tensor.softmax)
            and kwargs.get("dtype") == torch.float32
        ):
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


@contextmanager
def _eager(model):
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)


@torch.no_grad()
def published_maps(model, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return all maps (B, L, ...) of a float64 model by name, attention probabilities included.

    Rows of padding are 0.
    """
    seen = defaultdict(list)
    modules = find_layers(model)
    hooks = []

    def keep_input(module, args, kwargs):
        seen["x", module].append(args[0] if args else kwargs["hidden_states"])

    for m in {id(m.block): m for m in modules}.values():
        hooks.append(m.block.register_forward_pre_hook(keep_input, with_kwargs=True))
        hooks.append(_value(m).register_forward_hook(lambda mod, args, out: seen["v", mod].append(out)))
        for norm in {m.attention_norm, m.output_norm, m.added_norm} - {None}:
            hooks.append(norm.register_forward_pre_hook(lambda mod, args: seen["z", mod].append(args[0])))
    try:
        with _eager(model), Float64Throughout():
            output = model(**batch, output_attentions=True)
    finally:
        for hook in hooks:
            hook.remove()
    layers, calls = [], defaultdict(int)
    for m, alpha in zip(modules, output.attentions, strict=True):
        call = calls[m.block]
        calls[m.block] += 1
        sums = {
            norm: seen["z", norm][call]
            for norm in (m.attention_norm, m.output_norm, m.added_norm)
            if ("z", norm) in seen
        }
        layers.append(_layer(m, alpha, seen["x", m.block][call], seen["v", _value(m)][call], sums))
    maps = {name: torch.stack([layer[name] for layer in layers], dim=1) for name in layers[0]}
    return {name: _without_padding(t, name, batch.get("attention_mask")) for name, t in maps.items()}


def _value(m) -> nn.Module:
    """Return the module whose output ends with the values: their own, or that of queries, keys and values."""
    if m.value is not None:
        return m.value
    (fused,) = (
        module
        for module in m.attention.children()
        if isinstance(module, nn.Linear | Conv1D) and module is not m.output
    )
    return fused


def _without_padding(t: Tensor, name: str, mask: Tensor | None) -> Tensor:
    if mask is None:
        return t
    keep = mask.bool()
    shape = (keep.shape[0], *[1] * (t.dim() - 2), keep.shape[1])
    keep = keep.view(shape) if name.startswith("mix") else keep.view(*shape[:1], *shape[2:], 1)
    return t.masked_fill(~keep, 0)


def _layer(m, alpha: Tensor, x: Tensor, value: Tensor, sums: dict) -> dict[str, Tensor]:
    heads = alpha.shape[1]
    weight = m.output.weight if isinstance(m.output, Conv1D) else m.output.weight.T
    weight = weight.unflatten(0, (heads, -1))  # (H, dh, d)
    if m.value is None:
        # The queries are as wide as the attention output, and keys and values share the rest.
        value = value[..., (value.shape[-1] + weight.shape[:2].numel()) // 2 :]
    value = value.unflatten(-1, (-1, weight.shape[1]))  # (B, n, Hkv, dh)
    value = value.repeat_interleave(heads // value.shape[2], dim=2)
    f = torch.einsum("bjhe,hed->bhjd", value, weight)
    per_head = alpha[..., None] * f[:, :, None]  # (B, H, n, n, d)
    if m.scale is not None:
        per_head = per_head * getattr(*m.scale)
    if m.added_norm is not None:
        z = sums[m.added_norm]
        rms = (z.square().mean(-1) + m.added_norm.eps).sqrt()
        per_head = per_head / rms[:, None, :, None, None] * (1 + m.added_norm.weight)
    vectors = {"N": per_head.sum(1)}
    vectors["N_Res"] = (
        vectors["N"]
        + torch.eye(x.shape[1], dtype=x.dtype, device=x.device)[None, :, :, None] * x[:, :, None, :]
    )
    if not m.pre_norm:
        vectors["N_ResLN"] = _normalize(vectors["N_Res"], sums[m.attention_norm], m.attention_norm)
        vectors["N_Enc"] = _normalize(vectors["N_ResLN"], sums[m.output_norm], m.output_norm)
    out = {"attention": alpha, "head_N": per_head.norm(dim=-1)}
    for name, t in vectors.items():
        out[name] = t.norm(dim=-1)
        own = torch.diagonal(t, dim1=1, dim2=2).transpose(1, 2)
        mixed, own = (t.sum(2) - own).norm(dim=-1), own.norm(dim=-1)
        out[f"mix_{name}"] = torch.where(mixed > 0, mixed / (mixed + own), 0)
    return out


def _normalize(t: Tensor, z: Tensor, norm) -> Tensor:
    std = (z.var(-1, correction=0) + norm.eps).sqrt()
    return (t - t.mean(-1, keepdim=True)) / std[:, :, None, None] * norm.weight


def published_rollout(layers: Tensor) -> Tensor:
    """Return the rollout up to every layer, (B, L, n, n), of matrices (B, L, n, n)."""
    out = [layers[:, 0]]
    for index in range(1, layers.shape[1]):
        out.append(layers[:, index] @ out[-1])
    return torch.stack(out, dim=1)
