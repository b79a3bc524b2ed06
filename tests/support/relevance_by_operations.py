"""Relevance of small models, propagated operation by operation with the papers' rules and no autograd.

Every operation redistributes the relevance R of its outputs: R_in = x_i sum_j w_ij R_j / z_j for linear ones
(AttnLRP, eq. 8), and as the papers say for the others. GIM is written in the same form: a gradient g of y is
R / y.
"""

import math

import torch
from torch import Tensor

# The rules of each method: secants of activations, halved factors, gradients of probabilities, temperature.
METHODS = {
    "attnlrp": (True, True, True, 1),
    "cp-lrp": (True, False, False, 1),
    "gim": (False, True, True, 2),
    "libragrad": (True, True, False, 1),
}


class Node:
    """A tensor of the forward pass and its relevance."""

    def __init__(self, value: Tensor):
        self.value, self.relevance = value, torch.zeros_like(value)


class Relevance:
    """Computes a model forward, one operation at a time, and then the relevance backward."""

    def __init__(self, method: str):
        self.secants, self.halves, self.probabilities, self.temperature = METHODS[method]
        self.steps = []

    def _add(self, value: Tensor, backward) -> Node:
        out = Node(value)
        self.steps.append(lambda: backward(out.relevance))
        return out

    def propagate(self, out: Node, index) -> None:
        out.relevance[index] = out.value[index]
        for step in reversed(self.steps):
            step()

    def linear(self, x: Node, weight: Tensor, bias: Tensor | None = None) -> Node:
        """weight is (outputs, inputs)."""
        z = x.value @ weight.T + (0 if bias is None else bias)

        def backward(r: Tensor) -> None:
            x.relevance += x.value * ((r / z) @ weight)

        return self._add(z, backward)

    def sum(self, a: Node, b: Node) -> Node:
        z = a.value + b.value

        def backward(r: Tensor) -> None:
            a.relevance += a.value * r / z
            b.relevance += b.value * r / z

        return self._add(z, backward)

    def part(self, x: Node, index) -> Node:
        def backward(r: Tensor) -> None:
            x.relevance[index] += r

        return self._add(x.value[index], backward)

    def reshaped(self, x: Node, change, back) -> Node:
        def backward(r: Tensor) -> None:
            x.relevance += back(r)

        return self._add(change(x.value), backward)

    def activation(self, x: Node, f) -> Node:
        with torch.enable_grad():
            z = x.value.clone().requires_grad_()
            y = f(z)
            (slope,) = torch.autograd.grad(y.sum(), z)
        y = y.detach()

        def backward(r: Tensor) -> None:
            # The identity rule (AttnLRP, eq. 9), or gradient times input.
            x.relevance += r if self.secants else x.value * slope * r / y

        return self._add(y, backward)

    def gated(self, gate: Node, x: Node) -> Node:
        """The product of an activation's output with another branch (AttnLRP, eq. 7)."""

        def backward(r: Tensor) -> None:
            gate.relevance += r / 2 if self.halves else 0
            x.relevance += r / 2 if self.halves else r

        return self._add(gate.value * x.value, backward)

    def norm(
        self, x: Node, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, centred: bool = True
    ) -> Node:
        """y_i = sum_j M_ij x_j + bias_i with a constant deviation (Ali et al., eq. 9 and 10)."""
        d = x.value.shape[-1]
        centring = torch.eye(d, dtype=torch.float64) - (1 / d if centred else 0)
        z = x.value @ centring
        deviation = (z.square().mean(-1, keepdim=True) + eps).sqrt()
        y = z / deviation * weight + (0 if bias is None else bias)

        def backward(r: Tensor) -> None:
            x.relevance += x.value * ((r / y * weight / deviation) @ centring)

        return self._add(y, backward)

    def rotated(self, x: Node, cos: Tensor, sin: Tensor) -> Node:
        """Rotary positions of x (B, H, n, dh): a linear function of each token's features."""
        half = x.value.shape[-1] // 2

        def rotate(t: Tensor) -> Tensor:
            return torch.cat([-t[..., half:], t[..., :half]], -1)

        y = x.value * cos + rotate(x.value) * sin

        def backward(r: Tensor) -> None:
            g = r / y
            turned = g * sin
            x.relevance += x.value * (g * cos + torch.cat([turned[..., half:], -turned[..., :half]], -1))

        return self._add(y, backward)

    def attention(self, q: Node, k: Node, v: Node, scale: float, seen: Tensor, cap: float | None = None):
        """softmax(cap tanh(scale q k / cap)) v for (B, H, n, dh); seen is a mask (B or 1, 1, n, n)."""
        u = scale * q.value @ k.value.mT
        x = u if cap is None else cap * torch.tanh(u / cap)
        p = torch.where(seen, x, -math.inf).softmax(-1)
        o = p @ v.value

        def backward(r: Tensor) -> None:
            g = r / o
            share = 0.5 if self.probabilities else 1.0
            v.relevance += share * v.value * (p.mT @ g)
            if not self.probabilities:
                return
            of_p = 0.5 * p * (g @ v.value.mT)
            if self.temperature == 1:
                # Proposition 3.1 of AttnLRP.
                of_x = x * (of_p - p * of_p.sum(-1, keepdim=True))
            else:
                tempered = torch.where(seen, x / self.temperature, -math.inf).softmax(-1)
                slope = torch.where(p > 0, of_p / p, 0)
                of_x = x * tempered * (slope - (tempered * slope).sum(-1, keepdim=True))
            of_u = of_x
            if cap is not None and not self.secants:
                of_u = u * (1 - torch.tanh(u / cap) ** 2) * of_x / x
            q.relevance += 0.5 * scale * q.value * ((of_u / u) @ k.value)
            k.relevance += 0.5 * scale * k.value * ((of_u / u).mT @ q.value)

        return self._add(o, backward)

    def heads(self, x: Node, count: int, repeat: int = 1) -> Node:
        """(B, n, count * dh) -> (B, count * repeat, n, dh); each head is repeated for its group."""

        def change(t: Tensor) -> Tensor:
            return t.unflatten(2, (count, -1)).transpose(1, 2).repeat_interleave(repeat, 1)

        def back(r: Tensor) -> Tensor:
            return r.unflatten(1, (count, repeat)).sum(2).transpose(1, 2).flatten(2)

        return self.reshaped(x, change, back)

    def joined(self, x: Node) -> Node:
        heads = x.value.shape[1]
        return self.reshaped(
            x,
            lambda t: t.transpose(1, 2).flatten(2),
            lambda r: r.unflatten(2, (heads, -1)).transpose(1, 2),
        )

    def module(self, x: Node, linear) -> Node:
        """A torch Linear or transformers' Conv1D."""
        weight = linear.weight.T if type(linear).__name__ == "Conv1D" else linear.weight
        return self.linear(x, weight, linear.bias)

    def layer_norm(self, x: Node, norm) -> Node:
        return self.norm(x, norm.weight, norm.bias, norm.eps)


def llama_logits(tape: Relevance, model, x: Tensor, seen: Tensor) -> tuple[Node, Node]:
    """Llama, Qwen 2 and Gemma 2 kinds: the first layer's input and the logits (B, n, vocabulary)."""
    base, config = model.model, model.config
    gemma = config.model_type == "gemma2"
    n, group = x.shape[1], config.num_attention_heads // config.num_key_value_heads
    cos, sin = base.rotary_emb(x, torch.arange(n)[None])
    cos, sin = cos[:, None], sin[:, None]
    first = node = Node(x)

    def rms(t: Node, norm) -> Node:
        weight, eps = (1 + norm.weight, norm.eps) if gemma else (norm.weight, norm.variance_epsilon)
        return tape.norm(t, weight, eps=eps, centred=False)

    for layer in base.layers:
        attention, mlp = layer.self_attn, layer.mlp
        y = rms(node, layer.input_layernorm)
        q = tape.heads(tape.module(y, attention.q_proj), config.num_attention_heads)
        k = tape.heads(tape.module(y, attention.k_proj), config.num_key_value_heads, group)
        v = tape.heads(tape.module(y, attention.v_proj), config.num_key_value_heads, group)
        q, k = tape.rotated(q, cos, sin), tape.rotated(k, cos, sin)
        cap = config.attn_logit_softcapping if gemma else None
        out = tape.module(
            tape.joined(tape.attention(q, k, v, attention.scaling, seen, cap)), attention.o_proj
        )
        node = tape.sum(node, rms(out, layer.post_attention_layernorm) if gemma else out)
        y = rms(node, layer.pre_feedforward_layernorm if gemma else layer.post_attention_layernorm)
        gate = tape.activation(tape.module(y, mlp.gate_proj), mlp.act_fn)
        out = tape.module(tape.gated(gate, tape.module(y, mlp.up_proj)), mlp.down_proj)
        node = tape.sum(node, rms(out, layer.post_feedforward_layernorm) if gemma else out)
    logits = tape.module(rms(node, base.norm), model.lm_head)
    if gemma:
        cap = config.final_logit_softcapping
        logits = tape.activation(logits, lambda z: cap * torch.tanh(z / cap))
    return first, logits


def gpt2_logits(tape: Relevance, model, x: Tensor, seen: Tensor) -> tuple[Node, Node]:
    """The first layer's input and the logits (B, n, vocabulary) of GPT-2."""
    first = node = Node(x)
    d, heads = x.shape[2], model.config.n_head
    for layer in model.transformer.h:
        qkv = tape.module(tape.layer_norm(node, layer.ln_1), layer.attn.c_attn)
        q, k, v = (tape.heads(tape.part(qkv, (..., slice(i * d, i * d + d))), heads) for i in range(3))
        o = tape.attention(q, k, v, (d // heads) ** -0.5, seen)
        node = tape.sum(node, tape.module(tape.joined(o), layer.attn.c_proj))
        y = tape.module(tape.layer_norm(node, layer.ln_2), layer.mlp.c_fc)
        node = tape.sum(node, tape.module(tape.activation(y, layer.mlp.act), layer.mlp.c_proj))
    return first, tape.module(tape.layer_norm(node, model.transformer.ln_f), model.lm_head)


def bert_logits(tape: Relevance, model, x: Tensor, seen: Tensor) -> tuple[Node, Node]:
    """The first layer's input and the logits (B, classes) of a BERT classifier."""
    first = node = Node(x)
    heads = model.config.num_attention_heads
    for layer in model.bert.encoder.layer:
        own, out = layer.attention.self, layer.attention.output
        q, k, v = (tape.heads(tape.module(node, part), heads) for part in (own.query, own.key, own.value))
        o = tape.joined(tape.attention(q, k, v, own.attention_head_size**-0.5, seen))
        node = tape.layer_norm(tape.sum(tape.module(o, out.dense), node), out.LayerNorm)
        y = tape.activation(
            tape.module(node, layer.intermediate.dense), layer.intermediate.intermediate_act_fn
        )
        y = tape.sum(tape.module(y, layer.output.dense), node)
        node = tape.layer_norm(y, layer.output.LayerNorm)
    pooled = tape.module(tape.part(node, (slice(None), 0)), model.bert.pooler.dense)
    return first, tape.module(tape.activation(pooled, torch.tanh), model.classifier)


def vit_logits(tape: Relevance, model, x: Tensor, seen: Tensor) -> tuple[Node, Node]:
    """The first layer's input and the logits (B, classes) of a ViT classifier."""
    first = node = Node(x)
    heads = model.config.num_attention_heads
    for layer in model.vit.layers:
        y, own = tape.layer_norm(node, layer.layernorm_before), layer.attention
        q, k, v = (tape.heads(tape.module(y, part), heads) for part in (own.q_proj, own.k_proj, own.v_proj))
        o = tape.joined(tape.attention(q, k, v, (x.shape[2] // heads) ** -0.5, seen))
        node = tape.sum(tape.module(o, own.o_proj), node)
        y = tape.module(tape.layer_norm(node, layer.layernorm_after), layer.mlp.fc1)
        y = tape.activation(y, layer.mlp.activation_fn)
        node = tape.sum(tape.module(y, layer.mlp.fc2), node)
    top = tape.layer_norm(node, model.vit.layernorm)
    return first, tape.module(tape.part(top, (slice(None), 0)), model.classifier)


LOGITS = {
    "llama": llama_logits,
    "gemma2": llama_logits,
    "gpt2": gpt2_logits,
    "bert-classifier": bert_logits,
    "vit": vit_logits,
}


@torch.no_grad()
def token_relevance(name: str, model, batch: dict, method: str, target: int) -> tuple[Tensor, Tensor]:
    """Return the relevance of each token (B, n) for one logit, and this logit (B,).

    A language model explains the logit of the last token.
    """
    x = model(**batch, output_hidden_states=True).hidden_states[0]
    n = x.shape[1]
    causal = name in ("llama", "gemma2", "gpt2")
    seen = torch.ones(n, n, dtype=torch.bool)[None, None]
    seen = seen.tril() if causal else seen
    tape = Relevance(method)
    first, logits = LOGITS[name](tape, model, x, seen)
    index = (slice(None), -1, target) if causal else (slice(None), target)
    tape.propagate(logits, index)
    return first.relevance.sum(-1), logits.value[index]
