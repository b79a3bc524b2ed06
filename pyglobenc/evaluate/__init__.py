"""Measures how far attributions can be believed, on the user's own model and data."""

from pyglobenc.evaluate.run import evaluate
from pyglobenc.evaluate.table import EvaluationTable

__all__ = ["EvaluationTable", "evaluate"]
