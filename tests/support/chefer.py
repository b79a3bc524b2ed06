"""The published cases of transformer attribution, and its rules on materialised arrays for small models."""

import json

import torch
from models import GOLDEN
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification

from pyglobenc import capture
from pyglobenc.hf import find_layers
from pyglobenc.hf.unwrap import stock_model

BERT_NAMES = dict(
    vocab="vocab_size",
    hidden="hidden_size",
    layers="num_hidden_layers",
    heads="num_attention_heads",
    inter="intermediate_size",
    labels="num_labels",
    maxpos="max_position_embeddings",
)
VIT_NAMES = dict(
    img_size="image_size",
    embed_dim="hidden_size",
    depth="num_hidden_layers",
    num_heads="num_attention_heads",
    num_classes="num_labels",
)


def chefer_golden(name, dtype=torch.float64):
    """Return the model and the cases of "chefer_bert" or "chefer_vit".

    A case is the batch, the target as given, the target class, and the published outputs in float64.
    """
    settings = json.loads((GOLDEN / f"{name}.config.json").read_text())
    config = dict(settings["config"])
    if name == "chefer_bert":
        model = BertForSequenceClassification(
            BertConfig(**{BERT_NAMES.get(k, k): v for k, v in config.items()})
        )
        inputs = ("input_ids", "attention_mask")
    else:
        eps = config.pop("final_layernorm_eps")
        config["intermediate_size"] = config.pop("mlp_ratio") * config["embed_dim"]
        model = ViTForImageClassification(ViTConfig(**{VIT_NAMES.get(k, k): v for k, v in config.items()}))
        model.vit.layernorm.eps = eps
        inputs = ("pixel_values",)
    model.load_state_dict(load_file(GOLDEN / f"{name}.weights.safetensors"))
    model = model.to(dtype).eval()
    outputs = load_file(GOLDEN / f"{name}.outputs.safetensors")
    cases = []
    for index, case in enumerate(settings["cases"]):
        start = f"case{index}."
        published = {
            key.removeprefix(start): value for key, value in outputs.items() if key.startswith(start)
        }
        batch = {key: published[key] for key in inputs}
        batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
        cases.append((batch, case["index_arg"], case["index"], published))
    return model, cases


def relative(out, exact):
    """Return the relative L2 error."""
    return float((out.double() - exact).norm() / exact.norm())


def safe(a, b):
    den = b.clamp(min=1e-9) + b.clamp(max=1e-9)
    den = torch.where(den == 0, 1e-9, den)
    return a / den * (b != 0)


def linear(r, x, weight):
    pw, nw, px, nx = weight.clamp(min=0), weight.clamp(max=0), x.clamp(min=0), x.clamp(max=0)
    s = safe(r, px @ pw.T + nx @ nw.T)
    return px * (s @ pw) + nx * (s @ nw)


def product(r, equation, a, b):
    """Return the relevance of both factors of a product, by autograd as in the published code."""
    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    with torch.enable_grad():
        z = torch.einsum(equation, a, b)
        ga, gb = torch.autograd.grad(z, (a, b), safe(r, z.detach()))
    return a.detach() * ga, b.detach() * gb


def add(r, a, b):
    a, b = torch.broadcast_tensors(a, b)
    s = safe(r, a + b)
    r_a, r_b = a * s, b * s
    sum_a, sum_b = r_a.sum(), r_b.sum()
    both = sum_a.abs() + sum_b.abs()
    r_a = r_a * safe(safe(sum_a.abs(), both) * r.sum(), sum_a)
    return r_a, r_b * safe(safe(sum_b.abs(), both) * r.sum(), sum_b)


def lrp_linear(r, x, weight):
    out = 0
    for bound in ({"min": 0}, {"max": 0}):
        part, w = x.clamp(**bound), weight.clamp(**bound)
        out = out + part * (safe(r, part @ w.T) @ w)
    return out


def lrp_add(r, a, b):
    s = safe(r, a + b)
    return a * s, b * s


# The rules of a Linear module and of a residual sum, for the method itself and for the LRP baseline.
OURS, LRP = (linear, add), (lrp_linear, lrp_add)


def clone(x, *parts):
    return x * sum(safe(part, x) for part in parts)


def direct(model, batch, select, head, position=0, start_layer=0, rules=OURS, weights=None):
    """Return the rollout row (n,), and the first layer's input relevance (n, d), of one unpadded example.

    Everything is materialised.

    Args:
        select: returns the explained logit from the model's output.
        head: the head's Linear modules, from the top down. The first entry is a pair of the module and the
            explained row of its weight.
        position: position of the token that the head reads.
        weights: (n,) weights of a head that reads a sum over tokens. All Linear modules of the head are above
            the sum, and at most a norm of each token is below it.
    """
    (row, *rest) = head
    found, last = [], []
    stock = stock_model(model)
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    io, handles = (
        {},
        [
            m.register_forward_hook(lambda m, args, out: io.__setitem__(m, (args[0].detach(), out.detach())))
            for m in linears
        ],
    )
    # The head pools the last layer's output, which passes ViT's last norm first.
    top = getattr(stock.base_model, "layernorm", None) or find_layers(stock)[-1].block
    handles.append(
        top.register_forward_hook(
            lambda m, args, out: last.append((out[0] if isinstance(out, tuple) else out).detach())
        )
    )
    with capture(stock) as trace:
        output = model(**batch)
        grads = torch.autograd.grad(select(output), [layer.o for layer in trace.layers])
    for handle in handles:
        handle.remove()

    def at(t):
        return t if t.dim() == 2 else t[:, position]

    x = at(io[rest[-1] if rest else row[0]][0])
    through, _ = rules
    r = through(torch.ones(1, 1, dtype=x.dtype, device=x.device), at(io[row[0]][0]), row[1])
    for module in rest:
        r = through(r, at(io[module][0]), module.weight.detach())
    hidden = torch.zeros_like(trace.layers[-1].x)
    if weights is None:
        start = torch.eye(hidden.shape[1], dtype=x.dtype)[position]
        hidden[:, position] = clone(x, r)
    else:
        # The sum of each feature is a Linear with n inputs and one output.
        start = weights / weights.sum()
        hidden[0] = through(r.T, last[0][0].T, weights[None].to(x.dtype)).T
    r = hidden
    for layer, grad in zip(reversed(trace.layers), reversed(grads), strict=True):
        r, a = through_layer(layer, io, grad, r, rules)
        found.insert(0, a)
    rolled = None
    for a in found[start_layer:]:
        a = torch.eye(len(a), dtype=a.dtype, device=a.device) + a
        if not trace.layers[0].modules.pre_norm:
            a = a / a.sum(-1, keepdim=True)
        rolled = a if rolled is None else a @ rolled
    return start.to(rolled) @ rolled, r[0]


def through_layer(layer, io, grad, r, rules):
    """Return the relevance (1, n, d) of a layer's input, and its map (n, n), for one example."""
    (linear, add), m, x = rules, layer.modules, layer.x.detach()
    q, k, v, o = (t.detach() for t in (layer.q, layer.k, layer.v, layer.o))
    attended, mlp = io[m.output][1], io[m.mlp_output][1]
    y = x + attended if m.pre_norm else io[m.intermediate][0]
    r_mlp, r_y = add(r, mlp, y)
    r_mlp = linear(
        linear(r_mlp, io[m.mlp_output][0], m.mlp_output.weight.detach()),
        io[m.intermediate][0],
        m.intermediate.weight.detach(),
    )
    r_attended, r_x = add(clone(y, r_mlp, r_y), attended, x)
    r_o = linear(r_attended, io[m.output][0], m.output.weight.detach())
    dots = q @ k.transpose(2, 3)
    scores = dots * layer.scaling
    r_alpha, r_v = (
        t / 2
        for t in product(
            r_o.unflatten(2, (q.shape[1], -1)).transpose(1, 2), "bhij,bhjd->bhid", scores.softmax(-1), v
        )
    )
    a = (grad @ v.transpose(2, 3) * r_alpha).clamp(min=0).mean(1)[0]
    passed = r_alpha if m.pre_norm else add(r_alpha, scores, torch.zeros_like(scores))[0]
    r_q, r_k = (t / 2 for t in product(passed, "bhid,bhjd->bhij", q, k))
    merged = [t.transpose(1, 2).flatten(2) for t in (r_q, r_k, r_v)]
    modules = (m.query, m.key, m.value)
    parts = [linear(t, io[n][0], n.weight.detach()) for t, n in zip(merged, modules, strict=True)]
    below = sum(parts) if m.pre_norm else clone(x, *parts)
    return clone(x, below, r_x), a
