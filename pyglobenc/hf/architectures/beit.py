"""BEiT image encoders (pre-norm), with a factor on the attention's output and a relative position bias."""

from torch import nn

from pyglobenc.hf.trace.layers import LayerModules

MODEL_TYPES = ("beit",)


def layers(base: nn.Module) -> list[LayerModules]:
    """Return the modules of every layer, first to last.

    Args:
        base: the model without its head. Its layers map hidden states (B, n, d) to (B, n, d).
    """
    return [
        LayerModules(
            block=layer,
            attention=layer.attention,
            query=layer.attention.q_proj,
            key=layer.attention.k_proj,
            value=layer.attention.v_proj,
            output=layer.attention.o_proj,
            attention_norm=layer.layernorm_before,
            intermediate=layer.mlp.fc1,
            mlp_output=layer.mlp.fc2,
            output_norm=layer.layernorm_after,
            pre_norm=True,
            scale=(layer, "lambda_1") if isinstance(layer.lambda_1, nn.Parameter) else None,
        )
        for layer in base.layers
    ]
