"""BERT and its relatives with the same module names: RoBERTa, XLM-R, CamemBERT, ELECTRA."""

from torch import nn

from pyglobenc.hf.layers import LayerModules

MODEL_TYPES = ("bert", "roberta", "xlm-roberta", "camembert", "electra")


def layers(base: nn.Module) -> list[LayerModules]:
    """Modules of every layer, first to last; base is the model without its head."""
    return [
        LayerModules(
            block=layer,
            attention=layer.attention.self,
            query=layer.attention.self.query,
            key=layer.attention.self.key,
            value=layer.attention.self.value,
            output=layer.attention.output.dense,
            attention_norm=layer.attention.output.LayerNorm,
            intermediate=layer.intermediate.dense,
            mlp_output=layer.output.dense,
            output_norm=layer.output.LayerNorm,
        )
        for layer in base.encoder.layer
    ]
