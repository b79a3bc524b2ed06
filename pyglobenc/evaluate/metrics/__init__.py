"""The metrics by name. A new one is a function, and a line in its module's METRICS."""

from pyglobenc.evaluate.examples import Metric
from pyglobenc.evaluate.metrics import correlation, decoders, perturbation, rationales

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        *perturbation.METRICS,
        *correlation.METRICS,
        *rationales.METRICS,
        *decoders.METRICS,
    )
}

__all__ = ["METRICS"]
