"""BERT (post-norm) and models with the same module names: RoBERTa, XLM-R, CamemBERT, ELECTRA."""

from torch import nn

from pyglobenc.hf.trace.layers import LayerModules, part

MODEL_TYPES = ("bert", "roberta", "xlm-roberta", "camembert", "electra")


def layers(base: nn.Module) -> list[LayerModules]:
    """Return the modules of every layer, first to last.

    Args:
        base: the model without its head. Its layers map hidden states (B, n, d) to (B, n, d).
    """
    return [
        LayerModules(
            block=layer,
            attention=part(layer, "attention.self"),
            query=part(layer, "attention.self.query"),
            key=part(layer, "attention.self.key"),
            value=part(layer, "attention.self.value"),
            output=part(layer, "attention.output.dense"),
            attention_norm=part(layer, "attention.output.LayerNorm"),
            intermediate=part(layer, "intermediate.dense"),
            mlp_output=part(layer, "output.dense"),
            output_norm=part(layer, "output.LayerNorm"),
        )
        for layer in base.encoder.layer
    ]
