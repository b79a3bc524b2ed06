"""The metrics by name. A new one is a function, and a line in its module's METRICS."""

from pyglobenc.evaluate.examples import Metric
from pyglobenc.evaluate.metrics import (
    correlation,
    decoders,
    perturbation,
    published_perturbation,
    rationales,
    segmentation,
)

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        *perturbation.METRICS,
        *correlation.METRICS,
        *rationales.METRICS,
        *decoders.METRICS,
        *segmentation.METRICS,
    )
}
# The metrics that a published protocol defines in its own way.
OF_PROTOCOL: dict[str, dict[str, Metric]] = {
    protocol: {metric.name: metric for metric in metrics}
    for protocol, metrics in (
        ("chefer-movies", rationales.PUBLISHED),
        ("chefer-segmentation", segmentation.PUBLISHED),
        ("chefer-perturbation", published_perturbation.PUBLISHED),
    )
}

__all__ = ["METRICS", "OF_PROTOCOL"]
