"""What the aggregations of attention have in common."""

import abc
from collections.abc import Sequence

import numpy as np


class AttentionFlow(abc.ABC):
    """Aggregation of the layers' matrices over a model."""

    @abc.abstractmethod
    def compute_flows(
        self,
        attentions_list: Sequence[np.ndarray],
        desc: str = "",
        output_hidden_states: bool = False,
        num_cpus: int = 4,
    ) -> list[np.ndarray]:
        """Flow of every example's matrices (L, n, n): arrays (L, n, n), or (1, n, n) of the last layer."""

    def pre_process(self, att_mat: np.ndarray) -> np.ndarray:
        """Matrices (L, n, n) before they are aggregated; a subclass may change them."""
        return att_mat
