"""GlobEnc as published: every n*n*d decomposed vector formed, from the model's own eager attention and hidden states."""

import torch
from torch import Tensor

from pyglobenc.hf import find_layers


@torch.no_grad()
def published_maps(model, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """All nine maps (B, L, ...) of a float64 model, the attention probabilities among them; rows of padding are 0."""
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    values, sums = {}, {}
    modules = find_layers(model)
    hooks = [m.value.register_forward_hook(lambda mod, args, out: values.__setitem__(mod, out)) for m in modules]
    hooks += [
        norm.register_forward_pre_hook(lambda mod, args: sums.__setitem__(mod, args[0]))
        for m in modules
        for norm in (m.attention_norm, m.output_norm)
    ]
    try:
        output = model(**batch, output_attentions=True, output_hidden_states=True)
    finally:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(implementation)
    layers = [
        _layer(m, output.attentions[index], output.hidden_states[index], values[m.value], sums) for index, m in enumerate(modules)
    ]
    maps = {name: torch.stack([layer[name] for layer in layers], dim=1) for name in layers[0]}
    return {name: _without_padding(t, name, batch.get("attention_mask")) for name, t in maps.items()}


def _without_padding(t: Tensor, name: str, mask: Tensor | None) -> Tensor:
    if mask is None:
        return t
    keep = mask.bool()
    shape = (keep.shape[0], *[1] * (t.dim() - 2), keep.shape[1])
    keep = keep.view(shape) if name.startswith("mix") else keep.view(*shape[:1], *shape[2:], 1)
    return t.masked_fill(~keep, 0)


def _layer(m, alpha: Tensor, x: Tensor, value: Tensor, sums: dict) -> dict[str, Tensor]:
    heads = alpha.shape[1]
    value = value.unflatten(-1, (heads, -1))  # (B, n, H, dh)
    weight = m.output.weight.T.unflatten(0, (heads, -1))  # (H, dh, d)
    f = torch.einsum("bjhe,hed->bhjd", value, weight)
    per_head = alpha[..., None] * f[:, :, None]  # (B, H, n, n, d)
    vectors = {"N": per_head.sum(1)}
    vectors["N_Res"] = vectors["N"] + torch.eye(x.shape[1], dtype=x.dtype)[None, :, :, None] * x[:, :, None, :]
    vectors["N_ResLN"] = _normalize(vectors["N_Res"], sums[m.attention_norm], m.attention_norm)
    vectors["N_Enc"] = _normalize(vectors["N_ResLN"], sums[m.output_norm], m.output_norm)
    out = {"attention": alpha, "head_N": per_head.norm(dim=-1)}
    for name, t in vectors.items():
        out[name] = t.norm(dim=-1)
        own = torch.diagonal(t, dim1=1, dim2=2).transpose(1, 2)
        mixed, own = (t.sum(2) - own).norm(dim=-1), own.norm(dim=-1)
        out[f"mix_{name}"] = mixed / (mixed + own)
    return out


def _normalize(t: Tensor, z: Tensor, norm) -> Tensor:
    std = (z.var(-1, correction=0) + norm.eps).sqrt()
    return (t - t.mean(-1, keepdim=True)) / std[:, :, None, None] * norm.weight


def published_rollout(layers: Tensor) -> Tensor:
    """Rollout up to every layer of matrices (B, L, n, n): the same shape."""
    out = [layers[:, 0]]
    for index in range(1, layers.shape[1]):
        out.append(layers[:, index] @ out[-1])
    return torch.stack(out, dim=1)
