"""DecompX from the equations: all decomposed vectors (B, n, n, d) of every layer, for small cases.

The steps and the places of the biases are those of the published code. Everything is read from the model's
own modules with hooks, while it runs eager attention.
"""

from collections import defaultdict

import torch
from published import Float64Throughout
from torch import Tensor, nn

from pyglobenc.hf import find_layers


def split(t: Tensor, bias: Tensor, how: str, real: Tensor) -> Tensor:
    """Add a bias (d,) to decomposed vectors t (B, ..., sources + 1, d); the last source is the bias token."""
    weights = torch.zeros(t.shape[:-1], dtype=t.dtype)
    sources = weights[..., :-1]
    mask = real.view(len(real), *[1] * (t.dim() - 3), -1).to(t.dtype).expand(sources.shape)
    if how == "absdot":
        products = (t[..., :-1, :] @ bias).abs()
        total = products.sum(-1, keepdim=True)
        sources += torch.where(total > 0, products / total, 0)
    elif how == "equal":
        sources += mask / mask.sum(-1, keepdim=True)
    elif how == "cls":
        sources += nn.functional.one_hot(mask.argmax(-1), mask.shape[-1])
    elif how == "token":
        weights[..., -1] = 1
    return t + weights[..., None] * bias


def norm(t: Tensor, z: Tensor, module: nn.Module) -> Tensor:
    """Return the bias-free norm of t (B, n, sources, d), with the standard deviation of z (B, n, d)."""
    std = (z.var(-1, correction=0) + module.eps).sqrt()
    return (t - t.mean(-1, keepdim=True)) / std[:, :, None, None] * module.weight


def line(a: Tensor, z: Tensor) -> Tensor:
    return torch.where(z == 0, 0, a / z)


def bias_of(module: nn.Module) -> Tensor:
    return torch.zeros_like(module.weight[:, 0]) if module.bias is None else module.bias


@torch.no_grad()
def direct(model, batch: dict[str, Tensor], how: str, head: list[nn.Linear], pool: Tensor) -> Tensor:
    """Return what each source gives to each logit, (B, sources + 1, classes).

    Args:
        model: a float64 model with BERT's layers, or a module with such an encoder.
        batch: its inputs.
        how: the split of the biases.
        head: the Linear modules of the head, from the last layer's output up.
        pool: weight of each token in what the head reads, (B, n).
    """
    found, seen, hooks = find_layers(model), defaultdict(list), []

    def keep(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        seen[module].append((args[0] if args else kwargs["hidden_states"], output))

    parts = {part for m in found for part in (m.block, m.value, m.intermediate, m.mlp_output)}
    parts |= {part for m in found for part in (m.attention_norm, m.output_norm)} | set(head)
    hooks = [part.register_forward_hook(keep, with_kwargs=True) for part in parts]
    encoder = next(m for m in model.modules() if hasattr(m, "set_attn_implementation"))
    before = encoder.config._attn_implementation
    encoder.set_attn_implementation("eager")
    inner = encoder.base_model
    forward, probabilities = inner.forward, []

    def with_attention(*args, **kwargs):
        out = forward(*args, **(kwargs | dict(output_attentions=True)))
        probabilities.extend(out.attentions)
        return out

    inner.forward = with_attention
    try:
        with Float64Throughout():
            model(**batch)
    finally:
        del inner.forward
        encoder.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    size, n = real.shape
    t, calls = None, defaultdict(int)

    def call(module: nn.Module) -> tuple[Tensor, Tensor]:
        calls[module] += 1
        return seen[module][calls[module] - 1]

    for m, alpha in zip(found, probabilities, strict=True):
        x, values = call(m.block)[0], call(m.value)[1].unflatten(-1, (alpha.shape[1], -1))
        w_o = m.output.weight.T.unflatten(0, (alpha.shape[1], -1))
        own = torch.eye(n, dtype=x.dtype)[None, :, :, None] * x[:, :, None]
        if t is None:
            u = torch.einsum("bhij,bjhc,hcd->bijd", alpha, values, w_o) + own
            u, bias = torch.cat([u, torch.zeros_like(u[:, :, :1])], 2), bias_of(m.output)
        else:
            w_v = m.value.weight.T.unflatten(1, (alpha.shape[1], -1))
            u = t + torch.einsum("bhik,bkjd,dhc,hce->bije", alpha, t, w_v, w_o)
            bias = bias_of(m.output) + bias_of(m.value) @ m.output.weight.T
        u = split(u, bias, how, real)
        y = split(norm(u, call(m.attention_norm)[0], m.attention_norm), m.attention_norm.bias, how, real)
        z = split(y @ m.intermediate.weight.T, bias_of(m.intermediate), how, real)
        z = z * line(call(m.mlp_output)[0], call(m.intermediate)[1])[:, :, None]
        z = split(z @ m.mlp_output.weight.T, bias_of(m.mlp_output), how, real)
        t = split(norm(y + z, call(m.output_norm)[0], m.output_norm), m.output_norm.bias, how, real)
    pooled = torch.einsum("bi,bijd->bjd", pool.to(t.dtype), t)
    below = torch.einsum("bi,bid->bd", pool.to(t.dtype), seen[found[-1].output_norm][-1][1])
    for linear in head:
        given, returned = seen[linear][0]
        if given.dim() == 3:
            at = pool.argmax(1)
            given, returned = (s[torch.arange(size), at] for s in (given, returned))
        pooled = split(pooled * line(given, below)[:, None] @ linear.weight.T, bias_of(linear), how, real)
        below = returned
    return pooled
