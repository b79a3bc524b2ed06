"""Which layers the relevance rules of transformer attribution are defined for."""

from collections.abc import Sequence

from torch import nn

from pyglobenc.hf import LayerModules, LayerTrace
from pyglobenc.hf.trace.checks import LINEAR
from pyglobenc.hf.weights import is_plain


def check_layers(found: Sequence[LayerModules], captured: Sequence[LayerTrace] = ()) -> None:
    """Raise ValueError, with the reason, unless the layers are those of BERT or ViT: other shapes would be computed wrongly.

    Args:
        found: modules of every layer.
        captured: the layers after a forward pass, if there was one.
    """
    if len({id(m.block) for m in found}) < len(found):
        _refuse("its layers share modules, and each call of a module has its own relevance")
    for m in found:
        missing = [part for part in LINEAR if getattr(m, part) is None]
        if missing:
            _refuse(f"its layers have no Linear module of their own for {' and '.join(missing)}")
        for part in LINEAR:
            module = getattr(m, part)
            if type(module) is not nn.Linear or not is_plain(module.weight):
                _refuse(
                    f"{part} of a layer is a {type(module).__module__}.{type(module).__name__} whose weights aren't a plain matrix here; "
                    "merge adapters (merge_and_unload), load it unquantised, and don't offload its weights"
                )
        if m.pre_norm and not all(isinstance(norm, nn.LayerNorm) for norm in (m.attention_norm, m.output_norm)):
            _refuse("a norm before its attention or MLP is not a torch.nn.LayerNorm")
        if m.scale is not None or m.added_norm is not None:
            _refuse("its layers scale or normalise the attention's output before the residual sum")
        if m.own_scores is not None:
            _refuse("it computes attention scores itself")
    if any(layer.score_mod is not None for layer in captured):
        _refuse("its attention scores have a bias or a soft cap")
    if any(layer.window != (-1, -1) for layer in captured):
        _refuse("its attention is causal or local")


def _refuse(reason: str) -> None:
    raise ValueError(f"TransformerAttribution: the relevance rules don't cover this model: {reason}")
