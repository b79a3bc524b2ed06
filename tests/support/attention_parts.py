"""What the attention of each layer adds to the residual stream, from the model's own eager probabilities."""

from contextlib import ExitStack

import torch

from pyglobenc import capture


def parts(model, batch):
    """Yield for each layer its modules, x and z (B, n, d), before and after the attention's residual sum, and
    every vector that the sum adds to x, (B, H, n, n, d).
    """
    model = model.base_model
    with capture(model) as trace, torch.no_grad():
        model(**batch)
    layers = trace.layers
    outs, inputs, sums = [], [], []
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with ExitStack() as stack, torch.no_grad():
        for module in {layer.modules.output for layer in layers}:
            stack.callback(module.register_forward_hook(lambda m, args, out: outs.append(out)).remove)
        for module in {layer.modules.block for layer in layers}:
            keep = lambda m, args, kwargs: inputs.append(args[0] if args else kwargs["hidden_states"])  # noqa: E731
            stack.callback(module.register_forward_pre_hook(keep, with_kwargs=True).remove)
        norm = "output_norm" if layers[0].modules.pre_norm else "attention_norm"
        for module in {getattr(layer.modules, norm) for layer in layers}:
            stack.callback(module.register_forward_pre_hook(lambda m, args: sums.append(args[0])).remove)
        probabilities = model(**batch, output_attentions=True).attentions
    model.set_attn_implementation(before)
    for layer, alpha, out, x, z in zip(layers, probabilities, outs, inputs, sums, strict=True):
        v = layer.v.repeat_interleave(alpha.shape[1] // layer.v.shape[1], 1)
        vectors = torch.einsum("bhij,bhjc,hcd->bhijd", alpha, v, layer.output_weight)
        # A layer scale or a norm multiplies the attention's output by these factors.
        yield layer.modules, x, z, vectors * ((z - x) / out)[:, None, :, None]
