"""Token attribution for transformers, with fused kernels."""

from importlib import import_module
from typing import Any

from pyglobenc._version import __version__
from pyglobenc.evaluate import EvaluationTable, evaluate
from pyglobenc.explain import explain
from pyglobenc.results import Attribution, Attributions, GenerationAttribution, load

# These modules are imported when they are first used, because importing transformers' models takes seconds.
_MODULES = {
    "AttCat": "pyglobenc.methods.gradients.attcat",
    "CrossAttribution": "pyglobenc.methods.cross.attribution",
    "DecompX": "pyglobenc.methods.decompx.decompx",
    "GradientAttribution": "pyglobenc.methods.gradients.attribution",
    "GradientRollout": "pyglobenc.methods.gradients.gradient_rollout",
    "GlobEnc": "pyglobenc.methods.rollout.globenc",
    "InformationFlow": "pyglobenc.methods.rollout.information_flow",
    "Rollout": "pyglobenc.methods.rollout.baselines",
    "TransformerAttribution": "pyglobenc.methods.relevance.transformer_attribution",
    "capture": "pyglobenc.hf",
    "explain_generation": "pyglobenc.inputs.generation",
    "explain_image": "pyglobenc.inputs.images",
    "explain_layers": "pyglobenc.explain.layers",
    "explain_similarity": "pyglobenc.explain.similarity",
    "graphed": "pyglobenc.scale.graphs",
}

__all__ = [
    "AttCat",
    "Attribution",
    "Attributions",
    "CrossAttribution",
    "DecompX",
    "EvaluationTable",
    "GenerationAttribution",
    "GlobEnc",
    "GradientAttribution",
    "GradientRollout",
    "InformationFlow",
    "Rollout",
    "TransformerAttribution",
    "__version__",
    "capture",
    "evaluate",
    "explain",
    "explain_generation",
    "explain_image",
    "explain_similarity",
    "explain_layers",
    "graphed",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'pyglobenc' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value
