"""ALBERT (post-norm): the model applies one layer, or a few, many times."""

from torch import nn

from pyglobenc.hf.trace.layers import LayerModules

MODEL_TYPES = ("albert",)


def layers(base: nn.Module) -> list[LayerModules]:
    """Return the modules of every layer, first to last.

    A shared layer is listed once for each time it is applied.

    Args:
        base: the model without its head. Its layers map hidden states (B, n, d) to (B, n, d).
    """
    config = base.config
    groups = base.encoder.albert_layer_groups
    order = [
        groups[i * config.num_hidden_groups // config.num_hidden_layers]
        for i in range(config.num_hidden_layers)
    ]
    return [
        LayerModules(
            block=layer,
            attention=layer.attention,
            query=layer.attention.query,
            key=layer.attention.key,
            value=layer.attention.value,
            output=layer.attention.dense,
            attention_norm=layer.attention.LayerNorm,
            intermediate=layer.ffn,
            mlp_output=layer.ffn_output,
            output_norm=layer.full_layer_layer_norm,
        )
        for group in order
        for layer in group.albert_layers
    ]
