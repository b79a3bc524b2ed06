"""Attention rollout of any matrices, with the published arguments."""

from collections.abc import Sequence

import numpy as np
from tqdm.auto import tqdm

from pyglobenc.compat.globenc.attention_flow_abstract import AttentionFlow


class AttentionRollout(AttentionFlow):
    """Products of the layers' matrices (Abnar and Zuidema, 2020)."""

    def compute_flows(
        self,
        attentions_list: Sequence[np.ndarray],
        desc: str = "",
        output_hidden_states: bool = False,
        num_cpus: int = 0,
        disable_tqdm: bool = False,
    ) -> list[np.ndarray]:
        """Compute the rollout of each example.

        Args:
            attentions_list: one array (L, n, n) for each example, first layer first.
            desc: text shown beside the progress bar.
            output_hidden_states: return the rollout up to every layer; otherwise only up to the last one.
            num_cpus: ignored, as in the published code.
            disable_tqdm: show no progress bar.

        Returns:
            One float64 array for each example: (L, n, n), or (1, n, n) of the last layer.
        """
        bar = tqdm(attentions_list, desc=desc, disable=disable_tqdm)
        return [
            self.compute_joint_attention(matrices)[0 if output_hidden_states else -1 :] for matrices in bar
        ]

    def compute_joint_attention(self, att_mat: np.ndarray) -> np.ndarray:
        """Return the rollout of matrices (L, n, n) up to each layer, float64 (L, n, n)."""
        layers = np.asarray(self.pre_process(att_mat), dtype=np.float64)
        out = layers.copy()
        for index in range(1, len(layers)):
            out[index] = layers[index] @ out[index - 1]
        return out
