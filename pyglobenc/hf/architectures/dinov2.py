"""DINOv2 image encoders (pre-norm), with a factor on the attention's output."""

from torch import nn

from pyglobenc.hf.trace.layers import LayerModules

MODEL_TYPES = ("dinov2",)


def layers(base: nn.Module) -> list[LayerModules]:
    """Return the modules of every layer, first to last.

    Args:
        base: the model without its head. Its layers map hidden states (B, n, d) to (B, n, d).
    """
    return [_layer(layer) for layer in base.encoder.layer]


def _layer(layer: nn.Module) -> LayerModules:
    attention, mlp = layer.attention, layer.mlp
    if hasattr(attention, "q_proj"):
        projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    else:
        # transformers up to 5.17 has these module names.
        attention = attention.attention
        projections = (attention.query, attention.key, attention.value, layer.attention.output.dense)
    gated = not hasattr(mlp, "fc1")
    return LayerModules(
        block=layer,
        attention=attention,
        query=projections[0],
        key=projections[1],
        value=projections[2],
        output=projections[3],
        attention_norm=layer.norm1,
        intermediate=None if gated else mlp.fc1,
        mlp_output=mlp.fc2 if not gated else mlp.down_proj if hasattr(mlp, "down_proj") else mlp.weights_out,
        output_norm=layer.norm2,
        pre_norm=True,
        scale=(layer.layer_scale1, "lambda1"),
    )
