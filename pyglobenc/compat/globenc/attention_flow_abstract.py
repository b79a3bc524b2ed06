"""The base class of the methods that aggregate attention over layers."""

import abc
from collections.abc import Sequence

import numpy as np


class AttentionFlow(abc.ABC):
    """Aggregates the matrices of a model's layers."""

    @abc.abstractmethod
    def compute_flows(
        self,
        attentions_list: Sequence[np.ndarray],
        desc: str = "",
        output_hidden_states: bool = False,
        num_cpus: int = 4,
    ) -> list[np.ndarray]:
        """Return an array for each example's matrices (L, n, n): (L, n, n), or the last layer's (1, n, n)."""

    def pre_process(self, att_mat: np.ndarray) -> np.ndarray:
        """Return the matrices (L, n, n) that are aggregated; a subclass may change them here."""
        return att_mat
