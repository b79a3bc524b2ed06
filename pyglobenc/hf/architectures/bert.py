"""BERT (post-norm) and models with the same module names: RoBERTa, XLM-R, CamemBERT, ELECTRA."""

from torch import nn

from pyglobenc.hf.trace.layers import LayerModules

MODEL_TYPES = ("bert", "roberta", "xlm-roberta", "camembert", "electra")


def layers(base: nn.Module) -> list[LayerModules]:
    """Return the modules of every layer, first to last.

    Args:
        base: the model without its head. Its layers map hidden states (B, n, d) to (B, n, d).
    """
    return [
        _layer(layer, layer.attention.self, layer.attention.output, layer.output)
        for layer in base.encoder.layer
    ]


def _layer(layer: nn.Module, attention: nn.Module, attended: nn.Module, output: nn.Module) -> LayerModules:
    return LayerModules(
        block=layer,
        attention=attention,
        query=attention.query,
        key=attention.key,
        value=attention.value,
        output=attended.dense,
        attention_norm=attended.LayerNorm,
        intermediate=layer.intermediate.dense,
        mlp_output=output.dense,
        output_norm=output.LayerNorm,
    )
