"""The backward rules as hooks on the autograd graph of an unchanged model with eager attention.

Any model's graph can be changed this way. Each node's gradient is replaced after torch has computed it, so
this shares neither the operations nor the attention with the methods that it is compared with.
"""

import torch
from published import Float64Throughout
from relevance_by_operations import METHODS
from torch import Tensor, nn

from pyglobenc.hf import find_layers


class Elementwise(torch.autograd.Function):
    """An activation module as one node of the graph."""

    @staticmethod
    def forward(ctx, x: Tensor, f) -> Tensor:
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            y = f(z)
            (slope,) = torch.autograd.grad(y.sum(), z)
        ctx.save_for_backward(y.detach() / x, slope)
        return y.detach()

    @staticmethod
    def backward(ctx, grad: Tensor):
        secant, slope = ctx.saved_tensors
        return grad * (secant if Elementwise.secants else slope), None


def ruled_scores(model: nn.Module, batch: dict, method: str, target: int) -> tuple[Tensor, Tensor]:
    """Return the scores (B, n) of one class for each example, and its logits (B,)."""
    secants, halves, probabilities, temperature = METHODS[method]
    Elementwise.secants = secants
    stock = getattr(model, "encoder", model)
    before = stock.config._attn_implementation
    stock.set_attn_implementation("eager")
    inputs, replaced = [], []
    for module in model.modules():
        if type(module).__module__ == "transformers.activations":
            replaced.append(module)
            module.forward = lambda x, f=module.forward: Elementwise.apply(x, f)
    block = find_layers(stock)[0].block

    def start(module, args, kwargs):
        if not inputs:
            inputs.append(args[0] if args else kwargs["hidden_states"])

    hook = block.register_forward_pre_hook(start, with_kwargs=True)
    try:
        with Float64Throughout():
            out = model(**batch)
    finally:
        hook.remove()
        stock.set_attn_implementation(before)
        for module in replaced:
            del module.forward
    logits = out if isinstance(out, Tensor) else out.logits
    logit = (logits[:, -1] if logits.dim() == 3 else logits)[:, target]
    x = inputs[0]
    constants = ["RsqrtBackward0"] + ([] if probabilities else ["SoftmaxBackward0"])
    for node, reaching in _nodes(logit.grad_fn, x.grad_fn, constants).items():
        rule = _rule(node, reaching, secants, halves, temperature)
        if rule is not None:
            node.register_hook(rule)
    (grad,) = torch.autograd.grad(logit.sum(), x)
    return (grad * x).sum(-1).detach(), logit.detach()


def _nodes(top, source, constants) -> dict:
    """Every node from the top that leads to the source, with the places of its inputs that do.

    Nodes named in `constants` lead nowhere: their gradients become 0.
    """
    memo = {source: True}

    def reaches(node) -> bool:
        if node not in memo and node.name() in constants:
            memo[node] = False
            node.register_hook(lambda given, out: tuple(None if g is None else g * 0 for g in given))
        if node not in memo:
            memo[node] = any([reaches(n) for n, _ in node.next_functions if n is not None])
        return memo[node]

    reaches(top)
    return {
        node: [i for i, (n, _) in enumerate(node.next_functions) if n is not None and memo.get(n)]
        for node, yes in memo.items()
        if yes and node is not source
    }


def _rule(node, reaching, secants, halves, temperature):
    """Return the hook for one node, (gradients of its inputs, gradients of its output) -> new gradients."""
    name = node.name()
    if name in ("MulBackward0", "BmmBackward0", "MmBackward0") and len(reaching) == 2:
        gates = ["Elementwise" in n.name() or "Silu" in n.name() for n, _ in node.next_functions]
        if halves:
            return lambda given, out: tuple(g / 2 for g in given)
        if any(gates):
            return lambda given, out: tuple(
                torch.zeros_like(g) if gate else g for g, gate in zip(given, gates, strict=True)
            )
    if name == "DivBackward0" and len(reaching) == 2:
        return lambda given, out: (given[0], torch.zeros_like(given[1]))
    if name == "SoftmaxBackward0" and temperature != 1:
        p = node._saved_result
        tempered = (p.log() / temperature).softmax(-1)

        def softmax(given, out):
            g = tempered * out[0]
            return (g - tempered * g.sum(-1, keepdim=True), *given[1:])

        return softmax
    if name == "NativeLayerNormBackward0":
        rstd, weight = node._saved_result2, node._saved_weight

        def norm(given, out):
            g = out[0] * (1 if weight is None else weight)
            return ((g - g.mean(-1, keepdim=True)) * rstd, *given[1:])

        return norm
    if secants and name in ("GeluBackward0", "SiluBackward0"):
        z = node._saved_self
        y = (
            nn.functional.silu(z)
            if name[0] == "S"
            else nn.functional.gelu(z, approximate=node._saved_approximate)
        )
        return lambda given, out: (out[0] * y.detach() / z.detach(), *given[1:])
    if secants and name in ("ReluBackward0", "TanhBackward0"):
        y = node._saved_result.detach()
        return lambda given, out: (out[0] * ((y > 0) if name[0] == "R" else y / y.atanh()), *given[1:])
    return None
