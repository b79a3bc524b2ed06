"""BEiT image encoders (pre-norm), with a factor on the attention's output and a relative position bias."""

from torch import nn

from pyglobenc.hf.architectures import vit
from pyglobenc.hf.trace.layers import LayerModules

MODEL_TYPES = ("beit",)


def layers(base: nn.Module) -> list[LayerModules]:
    """Return the modules of every layer, first to last.

    Args:
        base: the model without its head. Its layers map hidden states (B, n, d) to (B, n, d).
    """
    return [
        modules._replace(scale=(modules.block, "lambda_1"))
        if isinstance(modules.block.lambda_1, nn.Parameter)
        else modules
        for modules in vit.layers(base)
    ]
